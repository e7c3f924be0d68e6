# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles without a daemon: `select` which stages, `state` what instructions say, `plan` steps, `execute` them.

The language is `recipe.dockerfile`; the frame of a build, its cache and its containers are those of definition files.
"""
