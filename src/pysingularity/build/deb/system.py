# SPDX-License-Identifier: Apache-2.0
"""A system from packages: unpack them all, then let dpkg inside the container configure them.

debootstrap unpacks every package twice, once from outside to have a shell and once by dpkg. Here the first time counts:
the database is written as dpkg would have, and dpkg only configures. What dpkg would have done before unpacking, the
preinst scripts, is done as follows. For the base system they run after unpacking (nothing can run before). Further
packages that have one wait until the base is configured and their Pre-Depends are met; then it runs, then they are
unpacked; file diversions that it made are heeded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pysingularity.build.bootstrap import BootstrapRequest
from pysingularity.build.deb import workers
from pysingularity.build.deb.database import Database, control_fields, key_of
from pysingularity.build.deb.packages import Package
from pysingularity.build.deb.tree import Tree
from pysingularity.build.deb.unpack import Job, Opened, Owned, control_members, open_deb, settle_owners, write_preinst
from pysingularity.build.deb.version import satisfies
from pysingularity.errors import UserError

#: What maintainer scripts are told (debconf(7)); dpkg passes it on.
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "DEBCONF_NONINTERACTIVE_SEEN": "true",
    "DEBCONF_NOWARNINGS": "yes",
    "LC_ALL": "C",
    "LANGUAGE": "C",
    "LANG": "C",
    "SYSTEMD_OFFLINE": "1",
}
#: Runs a preinst as dpkg does, from a folder where debconf looks: preinst NAME ARCHITECTURE DPKG-VERSION.
_PREINST = """
preinst() {
    echo "Preparing $1 ..."
    ci=/var/lib/dpkg/tmp.ci
    rm -rf $ci
    mkdir $ci
    echo "Package: ${1%%:*}" > $ci/control
    for part in preinst config templates; do
        if [ -e "/var/lib/dpkg/info/$1.$part" ]; then cp -p "/var/lib/dpkg/info/$1.$part" $ci/$part; fi
    done
    env DPKG_MAINTSCRIPT_PACKAGE="${1%%:*}" DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 DPKG_MAINTSCRIPT_ARCH="$2" \\
        DPKG_MAINTSCRIPT_NAME=preinst DPKG_RUNNING_VERSION="$3" DPKG_ROOT= DPKG_ADMINDIR=/var/lib/dpkg \\
        PERL_DL_NONLAZY=1 $ci/preinst install
    rm -rf $ci
}
"""
_POLICY = b"usr/sbin/policy-rc.d"
_NO_SERVICES = b"#!/bin/sh\n# No service starts while an image is built.\nexit 101\n"
_DAEMONS = (b"usr/sbin/start-stop-daemon", b"sbin/start-stop-daemon")
_NO_DAEMON = b'#!/bin/sh\necho "start-stop-daemon: nothing is started while an image is built"\n'
#: Logs, locks and caches that differ from build to build and say nothing of the image.
_RESIDUE = (
    *(b"var/log/" + name for name in (b"dpkg.log", b"alternatives.log", b"bootstrap.log", b"apt/history.log")),
    *(b"var/log/apt/" + name for name in (b"term.log", b"eipp.log.xz")),
    *(b"var/cache/debconf/" + name for name in (b"config.dat-old", b"templates.dat-old", b"passwords.dat-old")),
    *(b"var/lib/dpkg/" + name for name in (b"status-old", b"diversions-old", b"statoverride-old", b"available-old")),
    b"var/cache/ldconfig/aux-cache",
    b"var/lib/systemd/random-seed",
)


class System:
    """A system in the making.

    Arguments:
        request: what the build wants; `root`, `way`, `run` and `progress` are used.
        tree: its root file system, open.
        debs: checksum → path of the .deb, for all packages.
        architecture: in Debian's words.
    """

    def __init__(self, request: BootstrapRequest, tree: Tree, debs: dict[str, str], architecture: str) -> None:
        self.request, self.tree, self.debs, self.architecture = request, tree, debs, architecture
        self.database = Database(tree)
        self.packages: dict[str, Package] = {}
        self.owners: dict[bytes, str] = {}
        self._diversions: dict[str, dict[bytes, bytes]] = {}

    def install(self, base: Sequence[Package], extra: Sequence[Package]) -> None:
        """Unpack and configure everything.

        Arguments:
            base: packages that may need each other without saying so; they are configured first.
            extra: the rest.

        Raises:
            UserError: a package is damaged, or two have the same file, or a script of theirs fails.
        """
        self.database.create()
        # This one lays out the folders with their modes; everything else is unpacked in no particular order.
        first = [package for package in base if package.name == "base-files"]
        rest = [package for package in base if package.name != "base-files"]
        opened = self._unpack(first, in_place=True) + self._unpack(rest, in_place=True)
        waiting = {package.name: package for package in extra}
        done, waiting = self._unpack_ready(waiting, set())
        self.database.add(opened + done)
        self._prepare_run()
        self._run_base(opened)
        while waiting:
            installed = self._installed()
            ready = [package for package in waiting.values() if self._pre_depends_met(package, installed)]
            if not ready:
                self._configure_needs(waiting, installed, extra)
                continue
            self._run_preinst(ready)
            done, left = self._unpack_ready({package.name: package for package in ready}, {*waiting})
            assert not left
            self.database.add(done)
            self.database.activate(done, installed)
            for package in ready:
                del waiting[package.name]
        if extra:
            self._configure("--configure", "-a")
        self._check()

    def finish(self) -> None:
        """Take away what only the installation needed."""
        tree = self.tree
        tree.forget()
        tree.remove(_POLICY)
        for path in _DAEMONS:
            if tree.exists(path + b".REAL"):
                tree.rename(path + b".REAL", path)
        for path in _RESIDUE:
            tree.remove(path)
        if tree.exists(b"etc/machine-id"):  # every machine made from this image is to get its own (machine-id(5))
            tree.write(b"etc/machine-id", b"", 0o444)

    # -- unpacking ----------------------------------------------------------------------------------------------------

    def _unpack_ready(
        self, packages: dict[str, Package], deferred: set[str]
    ) -> tuple[list[Opened], dict[str, Package]]:
        """Unpack packages without a preinst, or whose preinst has run; return what was opened, and the others."""
        ready, waiting = [], {}
        for name, package in packages.items():
            if name in deferred or not self._has_preinst(package):
                ready.append(package)
            else:
                waiting[name] = package
        return self._unpack(ready, in_place=False), waiting

    def _has_preinst(self, package: Package) -> bool:
        return "preinst" in control_members(self._job(package, in_place=False))

    def _job(self, package: Package, *, in_place: bool, only: frozenset[bytes] = frozenset()) -> Job:
        diversions: dict[bytes, bytes] = {}
        for owner, paths in self._diversions.items():
            if owner != package.name:
                diversions.update(paths)
        name = key_of({"Package": package.name, "Architecture": package.architecture, "Multi-Arch": package.multi_arch})
        return Job(self.debs[package.sha256], name, package.installed_size, diversions, only, in_place)

    def _unpack(self, packages: Sequence[Package], *, in_place: bool) -> list[Opened]:
        """Unpack packages in parallel, set their owners, and settle who has files that several bring."""
        if not packages:
            return []
        self._diversions = self.database.diversions()
        jobs = [self._job(package, in_place=in_place) for package in packages]
        order = sorted(range(len(jobs)), key=lambda number: -packages[number].size)
        finished = 0

        def done(_: int) -> None:
            nonlocal finished
            finished += 1
            self.request.progress("unpacking packages", finished, len(jobs))

        # Children have descriptors of their own for the folders they open, made after the fork.
        self.tree.forget()

        def work(number: int) -> tuple[object, ...]:
            found = open_deb(jobs[number], self.tree)
            return tuple(found._replace(owned=[tuple(entry) for entry in found.owned]))  # type: ignore[misc]

        results = workers.run(work, len(jobs), order=order, done=done)
        opened = []
        for package, job, result in zip(packages, jobs, results, strict=True):
            found = Opened(*result)._replace(owned=[Owned(*entry) for entry in result[-1]])
            self._identify(package, found)
            opened.append(found)
            self.packages[job.name] = package
        self._settle(opened)
        for found in opened:
            settle_owners(self.tree, self.request.way.owners, found.owned)
        return opened

    def _identify(self, package: Package, opened: Opened) -> None:
        """Refuse a file whose inside is another package than its index says."""
        fields = control_fields(opened)
        inside = fields.get("Package"), fields.get("Version"), fields.get("Architecture")
        if inside != (package.name, package.version, package.architecture):
            raise UserError(
                "wrong-package",
                f"{package.filename}: contains {' '.join(str(word) for word in inside)}, not {package}",
                hint="the mirror's index does not fit its packages",
            )

    def _settle(self, opened: Sequence[Opened]) -> None:
        """Decide who has a file that several packages bring: the one that Replaces the other."""
        again: dict[str, set[bytes]] = {}
        taken: dict[str, set[bytes]] = {}
        owners = self.owners
        for package in opened:
            mine = package.name
            folders = set(package.folders)
            for path in package.paths:
                if path in folders:
                    continue
                other = owners.setdefault(path, mine)
                if other == mine or self._diverted(path, mine, other):
                    continue
                winner, loser = (mine, other) if self._replaces(mine, other) else (other, mine)
                if not self._replaces(winner, loser):
                    raise UserError(
                        "file-conflict",
                        f"packages {other} and {mine} both contain {os.fsdecode(path)}, and neither replaces the other",
                    )
                owners[path] = winner
                again.setdefault(winner, set()).add(path[1:])
                taken.setdefault(loser, set()).add(path)
        for name, paths in taken.items():
            self.database.without(name, frozenset(paths))
        for name, paths in again.items():
            job = self._job(self.packages[name], in_place=False, only=frozenset(paths))
            settle_owners(self.tree, self.request.way.owners, open_deb(job, self.tree).owned)

    def _diverted(self, path: bytes, one: str, other: str) -> bool:
        names = one.partition(":")[0], other.partition(":")[0]
        return any(path in paths and owner in names for owner, paths in self._diversions.items())

    def _replaces(self, winner: str, loser: str) -> bool:
        old = self.packages[loser]
        names = {old.name: old.version} | {relation.name: relation.version for relation in old.provides}
        for relation in self.packages[winner].replaces:
            version = names.get(relation.name)
            if version is not None and (
                not relation.relation or (version and satisfies(version, relation.relation, relation.version))
            ):
                return True
        return False

    # -- configuring --------------------------------------------------------------------------------------------------

    def _prepare_run(self) -> None:
        """Have a shell, and nothing that starts services."""
        tree = self.tree
        if not tree.exists(b"bin/sh"):  # before Debian 12 dash made this link when it was configured
            parent, name, _ = tree.place(b"bin/sh")
            os.symlink(b"dash", name, dir_fd=parent)
        if tree.exists(b"usr/sbin") or tree.merged:
            tree.write(_POLICY, _NO_SERVICES, 0o755)
        for path in _DAEMONS:
            if tree.exists(path) and not tree.exists(path + b".REAL"):
                tree.rename(path, path + b".REAL")
                tree.write(path, _NO_DAEMON, 0o755)
                break

    def _run_base(self, opened: Sequence[Opened]) -> None:
        """Run the preinst scripts of the base system and configure it."""
        lines = ["set -e", _PREINST]
        names = [package.name for package in opened]
        scripts = [package.name for package in opened if "preinst" in package.scripts]
        # The first one makes /etc/passwd, which chown in others' scripts needs.
        scripts.sort(key=lambda name: name != "base-passwd")
        lines += [self._preinst_line(name) for name in scripts]
        if "base-passwd" in names:
            lines.append("dpkg --force-depends --configure base-passwd")
            names.remove("base-passwd")
        lines.append(f"dpkg --configure {' '.join(sorted(names))}")
        self._shell(lines, "configuring the base system")

    def _run_preinst(self, packages: Sequence[Package]) -> None:
        lines = ["set -e", _PREINST]
        for package in packages:
            job = self._job(package, in_place=False)
            write_preinst(job, self.tree)
            self.packages[job.name] = package
            lines.append(self._preinst_line(job.name))
        self._shell(lines, "preparing packages")

    def _preinst_line(self, name: str) -> str:
        version = next((package.version for package in self.packages.values() if package.name == "dpkg"), "1")
        return f"preinst {name} {self.packages[name].architecture} {version}"

    def _configure(self, *words: str) -> None:
        self._shell(["set -e", f"dpkg {' '.join(words)}"], "configuring packages")

    def _shell(self, lines: list[str], what: str) -> None:
        """Run a script in the container.

        Raises:
            UserError: it fails.
        """
        self.request.progress(what)
        self.tree.forget()
        status = self.request.run(["/bin/sh", "-c", "\n".join(lines)], env=ENVIRONMENT)
        if status:
            states = self.database.states()
            stuck = [name for name, state in states.items() if state != "install ok installed"]
            broken = [name for name in stuck if "half" in states[name]] or stuck
            raise UserError(
                "configure-failed",
                f"{what}: dpkg ended with status {status}; not configured: {' '.join(broken[:8])}"
                + (f" and {len(broken) - 8} more" if len(broken) > 8 else ""),
                hint="the lines above tell what the packages' scripts said",
            )

    def _installed(self) -> set[str]:
        return {name for name, state in self.database.states().items() if state == "install ok installed"}

    def _pre_depends_met(self, package: Package, installed: set[str]) -> bool:
        names = {name.partition(":")[0] for name in installed}
        provided = {
            relation.name for name in installed if name in self.packages for relation in self.packages[name].provides
        }
        return all(
            any(relation.name in names or relation.name in provided for relation in group)
            for group in package.pre_depends
        )

    def _configure_needs(self, waiting: dict[str, Package], installed: set[str], extra: Sequence[Package]) -> None:
        """Configure what a waiting package pre-depends on.

        Raises:
            UserError: all that wait need each other.
        """
        named: dict[str, list[Package]] = {}
        for package in extra:
            for name in (package.name, *(relation.name for relation in package.provides)):
                named.setdefault(name, []).append(package)
        for package in waiting.values():
            needed: dict[str, Package] = {}
            groups = list(package.pre_depends)
            while groups:
                for relation in groups.pop():
                    for other in named.get(relation.name, ()):
                        if other.name not in needed:
                            needed[other.name] = other
                            groups += [*other.pre_depends, *other.depends]
            if not any(name in waiting for name in needed):
                names = [
                    name
                    for other in needed.values()
                    if (name := self._job(other, in_place=False).name) not in installed
                ]
                self._configure("--configure", *sorted(names))
                return
        names = sorted(waiting)
        raise UserError("pre-depends", f"Pre-Depends of these packages go round in a circle: {' '.join(names)}")

    def _check(self) -> None:
        left = {name: state for name, state in self.database.states().items() if state != "install ok installed"}
        if left:
            name, state = next(iter(left.items()))
            raise UserError("configure-failed", f"package {name} is not installed in the end but {state!r}")
