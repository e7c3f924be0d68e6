# SPDX-License-Identifier: Apache-2.0
"""What was done by hand in a writable sandbox, as a definition file to start from.

`record` says what a sandbox was when it was made; `installed` which packages are there; `compare` what has changed
since; `write` turns that into a definition file.
"""
