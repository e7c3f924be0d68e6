# SPDX-License-Identifier: Apache-2.0
"""Our version, and the command-line level that programs find when they ask for Singularity's."""

__version__ = "0.1.0"

#: The SingularityCE release whose command line we follow; tools parse it out of `singularity --version`.
LEVEL = "4.5.0"

#: What `singularity version` prints.
FULL = f"{LEVEL}+pysingularity.{__version__}"
