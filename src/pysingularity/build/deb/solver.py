# SPDX-License-Identifier: Apache-2.0
"""Which packages a system needs: wanted names closed under Pre-Depends and Depends, without conflicts.

A new system has no installed packages to keep, so the search is small: needs with one answer are taken first; where
several packages could answer, the earlier alternative is tried first, as apt does, and taken back when what it pulls in
does not fit with the rest. Recommends are left out, as debootstrap leaves them.
"""

from __future__ import annotations

from collections import deque

from pysingularity.build.deb import version as versions
from pysingularity.build.deb.control import Group, Relation
from pysingularity.build.deb.packages import Package, PackageIndex
from pysingularity.errors import UserError

#: Alternatives tried before we give up; a Debian desktop needs about 1 500 and takes none back.
MAX_TRIALS = 20_000
_PRIORITIES = {"required": 0, "important": 1, "standard": 2, "optional": 3, "extra": 4}

#: A need and the package that has it, for messages; None when the user has it.
Need = tuple[Group, Package | None]


class _Impossible(Exception):
    """A need cannot be met together with what has been chosen."""


class Solver:
    """Answer one question about one index.

    Arguments:
        index: what the sources offer.
        avoid: names never chosen for a dependency that has another answer.
    """

    def __init__(self, index: PackageIndex, *, avoid: frozenset[str] = frozenset()) -> None:
        self.index, self.avoid = index, avoid
        self._trials = 0

    def solve(self, wanted: list[Relation], base: list[Package] | None = None) -> list[Package]:
        """Return the packages that meet all of `wanted`, in the order in which they were chosen.

        Arguments:
            wanted: what the system is to have.
            base: packages that are chosen already; they are part of the result.

        Raises:
            UserError: a package is missing, or what is wanted cannot be installed together.
        """
        chosen: dict[str, Package] = {}
        # Names taken: by a package itself and by its Provides; and what chosen packages do not tolerate.
        queue: deque[Need] = deque()
        for package in base or ():
            chosen[package.name] = package
            queue += [(group, package) for group in (*package.pre_depends, *package.depends)]
        for relation in wanted:
            if not self.index.candidates(relation.name) and not self.index.providers(relation.name):
                raise self._missing(relation)
            queue.append(((relation,), None))
        try:
            return list(self._close(chosen, queue, []).values())
        except _Impossible as error:
            raise UserError(
                "unsatisfiable",
                str(error),
                hint="a mirror in the middle of an update heals by itself; else look at Include and the suite",
            ) from None

    def _close(self, chosen: dict[str, Package], queue: deque[Need], open_: list[Need]) -> dict[str, Package]:
        """Take what has one answer; then try the answers of the first need that has several."""
        while True:
            while queue:
                group, owner = queue.popleft()
                answers = self._answers(group, owner, chosen)
                if answers is None:
                    continue
                if len(answers) == 1:
                    self._take(answers[0], owner, chosen, queue)
                else:
                    open_.append((group, owner))
            rest: list[Need] = []
            choice: tuple[Need, list[Package]] | None = None
            for need in open_:  # later choices may have answered earlier questions
                answers = self._answers(*need, chosen)
                if answers is None:
                    continue
                if len(answers) == 1:
                    queue.append(need)
                elif choice is None:
                    choice = need, answers
                else:
                    rest.append(need)
            open_ = rest
            if queue:
                if choice is not None:
                    open_.insert(0, choice[0])
                continue
            if choice is None:
                return chosen
            first: _Impossible | None = None
            (_, owner), answers = choice
            for package in answers:
                self._trials += 1
                if self._trials > MAX_TRIALS:
                    raise _Impossible("too many combinations of packages tried") from first
                trial, needs = dict(chosen), deque[Need]()
                try:
                    self._take(package, owner, trial, needs)
                    return self._close(trial, needs, list(open_))
                except _Impossible as error:
                    first = first or error
            assert first is not None
            raise first

    def _answers(self, group: Group, owner: Package | None, chosen: dict[str, Package]) -> list[Package] | None:
        """Return packages that meet a need, best first, or None when a chosen one does.

        Raises:
            _Impossible: no package does.
        """
        for relation in group:
            if self._met(relation, chosen):
                return None
        found: list[Package] = []
        for relation in group:
            for package in self._matching(relation):
                # A name that is taken by another version is no answer.
                if package not in found and package.name not in chosen:
                    found.append(package)
                    if package.name == relation.name:
                        break  # older versions only when the newest does not fit the relation
        kept = [package for package in found if package.name not in self.avoid] or found
        possible = [package for package in kept if not self._clash(package, chosen)]
        if not possible:
            raise _Impossible(self._why(group, owner, chosen, kept))
        return possible

    def _met(self, relation: Relation, chosen: dict[str, Package]) -> bool:
        package = chosen.get(relation.name)
        if package is not None and self._fits(package, relation):
            return True
        return any(
            provider.name in chosen and chosen[provider.name] is provider for provider in self._providing(relation)
        )

    def _matching(self, relation: Relation) -> list[Package]:
        own = [package for package in self.index.candidates(relation.name) if self._fits(package, relation)]
        virtual = self._providing(relation)
        virtual.sort(key=lambda package: _PRIORITIES.get(package.priority, 5))
        return own + virtual

    def _providing(self, relation: Relation) -> list[Package]:
        found = []
        for package, provided in self.index.providers(relation.name):
            if not self._arch_fits(package, relation):
                continue
            if not relation.relation or (
                provided.relation == "=" and versions.satisfies(provided.version, relation.relation, relation.version)
            ):
                found.append(package)
        return found

    def _fits(self, package: Package, relation: Relation) -> bool:
        return self._arch_fits(package, relation) and (
            not relation.relation or versions.satisfies(package.version, relation.relation, relation.version)
        )

    def _arch_fits(self, package: Package, relation: Relation) -> bool:
        if relation.arch in ("", "native"):
            return True
        if relation.arch == "any":
            return package.multi_arch == "allowed"
        return relation.arch == self.index.architecture

    def _take(self, package: Package, owner: Package | None, chosen: dict[str, Package], queue: deque[Need]) -> None:
        clash = self._clash(package, chosen)
        if clash:
            raise _Impossible(f"{_need_of(owner)}{package.name} {package.version}, which {clash}")
        chosen[package.name] = package
        queue.extend((group, package) for group in (*package.pre_depends, *package.depends))

    def _clash(self, package: Package, chosen: dict[str, Package]) -> str:
        """Return why a package cannot stand beside the chosen ones, or ""."""
        other = chosen.get(package.name)
        if other is not None and other is not package:
            return f"is wanted in version {other.version} too"
        for relation in (*package.conflicts, *package.breaks):
            for candidate in self._hit(relation, chosen):
                if candidate.name != package.name:
                    return f"conflicts with {candidate.name} {candidate.version} ({relation})"
        names = {package.name: package.version} | {provided.name: provided.version for provided in package.provides}
        for candidate in chosen.values():
            if candidate.name == package.name:
                continue
            for relation in (*candidate.conflicts, *candidate.breaks):
                if relation.name in names and _touches(names[relation.name], relation):
                    return f"{candidate.name} {candidate.version} does not tolerate ({relation})"
        return ""

    def _hit(self, relation: Relation, chosen: dict[str, Package]) -> list[Package]:
        found = []
        package = chosen.get(relation.name)
        if package is not None and _touches(package.version, relation):
            found.append(package)
        for provider, provided in self.index.providers(relation.name):
            if chosen.get(provider.name) is provider and _touches(provided.version, relation):
                found.append(provider)
        return found

    def _why(self, group: Group, owner: Package | None, chosen: dict[str, Package], found: list[Package]) -> str:
        words = " or ".join(map(str, group))
        if found:
            clash = self._clash(found[0], chosen)
            return f"{_need_of(owner)}{words}, and {found[0].name} {found[0].version} {clash}"
        known = [
            f"{package.name} is {package.version}"
            for relation in group
            for package in (chosen.get(relation.name), *self.index.candidates(relation.name)[:1])
            if package is not None
        ]
        return f"{_need_of(owner)}{words}, which no source offers" + (f" ({known[0]} there)" if known else "")

    def _missing(self, relation: Relation) -> UserError:
        import difflib  # only for an error

        near = difflib.get_close_matches(relation.name, self.index.names(), n=3, cutoff=0.75)
        return UserError(
            "no-such-package",
            f"no source offers the package {relation.name}",
            hint=f"did you mean {', '.join(near)}?" if near else "is it in another suite or component?",
        )


def _touches(version: str, relation: Relation) -> bool:
    """Return whether a conflict holds for a version ("" is an unversioned Provides, which only plain ones reach)."""
    if not relation.relation:
        return True
    return bool(version) and versions.satisfies(version, relation.relation, relation.version)


def _need_of(owner: Package | None) -> str:
    return f"{owner.name} {owner.version} needs " if owner is not None else "the definition file wants "
