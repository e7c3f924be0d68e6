# SPDX-License-Identifier: Apache-2.0
"""People and robots: passwords, tokens, sign-ins, groups, what each may do, limits, and the audit log."""
