# SPDX-License-Identifier: Apache-2.0
"""Definition file to image: a plan of steps, the agents that fetch a root file system, and its execution."""
