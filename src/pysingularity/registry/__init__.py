# SPDX-License-Identifier: Apache-2.0
"""References to images: registries, layers, libraries and hubs. No processes are started here."""
