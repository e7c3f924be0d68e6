# SPDX-License-Identifier: Apache-2.0
"""Options and an image to a running process: everything decided first (LaunchSpec), entered last."""
