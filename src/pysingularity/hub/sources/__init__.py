# SPDX-License-Identifier: Apache-2.0
"""Where recipes come from: git repositories, what is in them, and how we hear that they changed."""
