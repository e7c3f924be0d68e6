# SPDX-License-Identifier: Apache-2.0
"""The agents of a definition file's header, one per file: each fills an empty folder with a root file system."""
