# SPDX-License-Identifier: Apache-2.0
"""The commands: the table of them, their options, one file each. Only this room prints and exits."""
