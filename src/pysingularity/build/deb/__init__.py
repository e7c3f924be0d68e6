# SPDX-License-Identifier: Apache-2.0
"""Debian's package world in Python: sources, signed indexes, versions, dependencies, .deb files and dpkg's database.

Nothing here starts dpkg, ar, tar or gpg except `verify`, which asks gpgv, sqv or pysequoia for a signature. From the
first question to the last: `sources` (which mirrors) → `release` + `verify` (may they be believed) → `packages` (what
they offer) → `solver` (what is needed) → `fetch` (bring it) → `archive` + `unpack` (open it) → `database` (tell dpkg).
The agent that strings them together is `build.bootstrap.debootstrap`.
"""
