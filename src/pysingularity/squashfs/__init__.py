# SPDX-License-Identifier: Apache-2.0
"""The squashfs 4.0 file system: reading, writing, unpacking and serving it over FUSE."""
