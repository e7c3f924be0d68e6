# SPDX-License-Identifier: Apache-2.0
"""Singularity Hub: collections of recipes in git, their builds, the images and the doors they are served by."""
