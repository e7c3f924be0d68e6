# SPDX-License-Identifier: Apache-2.0
"""Singularity Hub: collections of recipes in git, their builds, the images and the doors they are served by.

The rooms of this house, from the ground up:

    errors settings models database   words everybody uses; one schema for SQLite and PostgreSQL
    context                           `Hub`: settings, database and storage of one installation, passed to everyone
    accounts/                         who somebody is and what they may do
    storage/                          blobs by their sha256, uploads that can be resumed, quotas
    catalog                           collections, containers, tags and images: the rules of naming and replacing
    sources/                          git, discovery of recipes, webhooks, polling
    builds/                           states, queue, log, planning, acceptance of results
    engines/                          where a build runs: local processes; the sandbox
    api/ protocols/ pages/            what is spoken over HTTP
    keeping/                          garbage collection, retention, backup, export, health
    app serve robots command          processes and the command line
"""
