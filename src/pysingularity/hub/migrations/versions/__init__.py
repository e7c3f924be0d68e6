# SPDX-License-Identifier: Apache-2.0
"""The steps, in the order of their numbers."""
