# SPDX-License-Identifier: Apache-2.0
"""Singularity containers and Singularity Hub, from scratch, for users without root."""
