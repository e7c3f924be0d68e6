# SPDX-License-Identifier: Apache-2.0
"""The Linux kernel in Python: one function per call, no policy, errno turned into OSError in one place."""
