# SPDX-License-Identifier: Apache-2.0
"""The Singularity Image Format: header, descriptors, objects."""
