# SPDX-License-Identifier: Apache-2.0
"""Bootstrap: debootstrap — Debian, Ubuntu and their kin from a mirror, without the program of that name or root.

Keywords: MirrorURL (left out on a Debian or Ubuntu host: the host's own apt sources), OSVersion (left out: the host's
release), Include (packages besides the smallest system, with blanks or commas), Components (main; for Ubuntu main and
universe), Keyring (a file with the mirror's keys), Verify (no: signatures do not count; no-date: signatures count, but
a release may have expired, as archived ones have).
The packages are those of debootstrap's variant minbase: essential ones, those of priority required, and apt.
"""

from __future__ import annotations

import hashlib
import os
import re
from datetime import UTC, datetime
from typing import NamedTuple

from pysingularity import messages
from pysingularity.build import space
from pysingularity.build.bootstrap import BootstrapRequest, BootstrapResult
from pysingularity.build.deb.control import Relation
from pysingularity.build.deb.fetch import Fetcher, Item, NotFound, address
from pysingularity.build.deb.keyrings import archive_keyrings
from pysingularity.build.deb.packages import Archive, Package, PackageIndex
from pysingularity.build.deb.release import MAX_RELEASE, IndexFile, Release
from pysingularity.build.deb.solver import Solver
from pysingularity.build.deb.sources import SCHEMES, Source, codename, host_sources, of_distribution
from pysingularity.build.deb.system import System
from pysingularity.build.deb.tree import Tree
from pysingularity.errors import HostError, SingularityError, UserError
from pysingularity.trust.openpgp import Verifier

#: Suites from before /bin, /lib and /sbin became links into /usr (bullseye's installer linked, its packages need not).
NOT_MERGED = frozenset(
    "potato woody sarge etch lenny squeeze wheezy jessie stretch "
    "precise quantal raring saucy trusty utopic vivid wily xenial yakkety zesty artful bionic cosmic".split()
)
#: Suites of Ubuntu, whose smallest useful set of components is larger.
UBUNTU = frozenset(
    "precise trusty xenial bionic cosmic disco eoan focal groovy hirsute impish jammy kinetic lunar mantic noble "
    "oracular plucky questing devel".split()
)
_SUITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_/-]*")
_PACKAGE = re.compile(r"([a-z0-9][a-z0-9+.-]*)(?::([a-z0-9-]+))?(?:=(\S+))?")
#: Pairs of links below /dev that programs expect even where nobody mounts one.
_DEVICES = (
    (b"fd", b"/proc/self/fd"),
    (b"stdin", b"/proc/self/fd/0"),
    (b"stdout", b"/proc/self/fd/1"),
    (b"stderr", b"/proc/self/fd/2"),
)


class Trust(NamedTuple):
    """How the signature of a source was settled: "signed", "unchecked" (signed, but nobody looked) or "unsigned"."""

    state: str
    keyring: str


def bootstrap(request: BootstrapRequest) -> BootstrapResult:
    """Fill the root with the smallest system of a suite and the packages of Include.

    Raises:
        UserError: the mirror, a package or the recipe is at fault.
        HostError: there is no keyring, or no space.
    """
    work = _Bootstrap(request)
    try:
        return work.run()
    finally:
        work.fetcher.close()


class _Bootstrap:
    def __init__(self, request: BootstrapRequest) -> None:
        self.request = request
        self.fetcher = Fetcher(os.path.join(request.cache, "deb"), request.environ, request.progress)
        word = request.header.get("verify", "yes").strip().lower()
        if word not in ("yes", "no", "no-date"):
            raise UserError("bad-keyword", f"Verify: {word}: it is yes, no or no-date")
        self.verify = word != "no" and not request.options.get("no-verify")
        self.check_date = word != "no-date"
        self.suite, self.sources, self.from_host = self._sources()
        self.trust: dict[Source, Trust] = {}
        self.hash = hashlib.sha256()

    def run(self) -> BootstrapResult:
        request = self.request
        index = PackageIndex(request.arch)
        for source in self.sources:
            self._add(index, source)
        merged = self.suite.partition("-")[0] not in NOT_MERGED
        base, extra = self._choose(index, merged)
        packages = base + extra
        for package in sorted(packages, key=lambda package: package.name):
            self.hash.update(f"{package.name} {package.version} {package.sha256}\n".encode())
        size = sum(package.size for package in packages)
        messages.info(f"{len(packages)} packages of {self.suite}, {size / 1e6:.1f} MB")
        space.need(
            request.root, sum(package.installed_size for package in packages), f"a system of {len(packages)} packages"
        )
        items = [
            Item(address(package.archive.url, package.filename), package.size, package.sha256, package.name)
            for package in packages
        ]
        debs = self.fetcher.bring(items, "fetching packages")
        with Tree(request.root, merged=merged) as tree:
            system = System(request, tree, debs, request.arch)
            system.install(base, extra)
            self._devices(tree)
            system.finish()
            self._write_sources(tree)
        return BootstrapResult(digest=f"sha256:{self.hash.hexdigest()}", source=self._describe())

    # -- sources ------------------------------------------------------------------------------------------------------

    def _sources(self) -> tuple[str, list[Source], bool]:
        header = self.request.header
        _, name = codename()
        suite = header.get("osversion", "").strip() or name
        if not suite:
            raise UserError(
                "keyword-missing",
                "Bootstrap: debootstrap needs the keyword OSVersion on a host that is not Debian or Ubuntu",
                hint="add a line to the header: OSVersion: bookworm",
            )
        if not _SUITE.fullmatch(suite) or ".." in suite:
            raise UserError("bad-keyword", f"OSVersion: {suite!r} is no name of a suite")
        components = tuple(header.get("components", "").replace(",", " ").split())
        mirror = header.get("mirrorurl", "").strip()
        if not mirror:
            found = of_distribution(host_sources(), suite)
            if not found:
                known = " ".join(sorted({source.suite for source in host_sources() if "main" in source.components}))
                raise UserError(
                    "no-mirror",
                    f"MirrorURL is not given, and this host has no apt source for {suite}"
                    + (f" (it has {known})" if known else ""),
                    hint="add the address of a mirror to the header: MirrorURL: ADDRESS",
                )
            if components:
                found = [source._replace(components=components) for source in found]
            return suite, [self._site(source) for source in found], True
        mirror = mirror.replace("%{OSVERSION}", suite).rstrip("/")
        if mirror.startswith("/"):
            mirror = f"file://{mirror}"
        if mirror.partition(":")[0] not in SCHEMES:
            raise UserError("bad-keyword", f"MirrorURL: {mirror!r} starts with none of {', '.join(SCHEMES)}")
        if not components:
            components = ("main", "universe") if suite.partition("-")[0] in UBUNTU else ("main",)
        source = Source(mirror, suite, components, self._keyring(), check_date=self.check_date)
        return suite, [source], False

    def _site(self, source: Source) -> Source:
        """Apply what the header says on signatures to a source of the host."""
        return source._replace(
            signed_by=self._keyring() or source.signed_by, check_date=self.check_date and source.check_date
        )

    def _keyring(self) -> str:
        name = self.request.header.get("keyring", "").strip()
        if not name:
            return ""
        path = os.path.join(self.request.directory, name)
        if not os.path.isfile(path):
            raise UserError("no-keyring", f"Keyring: {path} is not there")
        return os.path.abspath(path)

    # -- indexes ------------------------------------------------------------------------------------------------------

    def _add(self, index: PackageIndex, source: Source) -> None:
        """Fetch what a source has to offer, and believe it if its signature is right."""
        base = f"{source.url}/dists/{source.suite}"
        self.request.progress(f"asking {source.url} for {source.suite}")
        release = self._release(source, base)
        release.check_suite(source.suite)
        release.check_architecture(self.request.arch)
        if source.check_date and self.verify:
            release.check_date(datetime.now(UTC))
        for component in source.components:
            data = self._index(release, base, component)
            index.add(data, Archive(source.url, source.suite, f"{base} {component}"))

    def _release(self, source: Source, base: str) -> Release:
        signature: bytes | None = None
        try:
            what = f"{base}/InRelease"
            text = self.fetcher.get(what, MAX_RELEASE)
            inline = True
        except NotFound:
            inline = False
            what = f"{base}/Release"
            try:
                text = self.fetcher.get(what, MAX_RELEASE)
            except NotFound:
                raise UserError(
                    "no-suite",
                    f"{source.url} has no suite {source.suite}: neither InRelease nor Release below dists/",
                    hint="check MirrorURL and OSVersion; old releases move to their distribution's archive",
                ) from None
            try:
                signature = self.fetcher.get(f"{what}.gpg", MAX_RELEASE)
            except NotFound:
                signature = None
        checked = self._signed(source, what, text, signature, inline=inline)
        return Release(checked, what)

    def _signed(self, source: Source, what: str, text: bytes, signature: bytes | None, *, inline: bool) -> bytes:
        """Return the part of a Release file that is signed, or all of it where the user goes without."""
        keyrings = self._keys(source)
        has = signature is not None or (inline and text.lstrip().startswith(b"-----BEGIN PGP"))
        if source.trusted or not self.verify:
            self.trust[source] = Trust("unchecked" if has else "unsigned", "")
            if not source.trusted:
                messages.warning(f"{what}: its signature is not checked, as you wish")
            return _bare(text) if inline else text
        if not has:
            raise UserError(
                "unsigned-release",
                f"{what}: is not signed: refused",
                hint="use a mirror with signatures; a private one without can be had with Verify: no in the header",
            )
        verifier = Verifier(
            keyrings,
            self.request.tmp,
            self.request.environ,
            missing="install the distribution's newer archive keyring, name one with Keyring: FILE, or say Verify: no",
            otherwise="; Verify: no in the header goes without",
        )
        if inline:
            text = verifier.inline(text, what)
        else:
            assert signature is not None
            verifier.detached(text, signature, what)
        self.trust[source] = Trust("signed", source.signed_by)
        return text

    def _keys(self, source: Source) -> list[str]:
        """Return the files with keys that may sign a source."""
        by = source.signed_by
        if by.startswith("-----BEGIN"):
            path = os.path.join(self.request.tmp, "signed-by.asc")
            with open(path, "w", encoding="ascii", errors="replace") as file:
                file.write(by + "\n")
            return [path]
        paths = [word for word in re.split(r"[\s,]+", by) if word.startswith("/")]
        return paths or archive_keyrings()

    def _index(self, release: Release, base: str, component: str) -> bytes:
        """Return a Packages index, from the cache or the mirror."""
        forms = release.packages(component, self.request.arch)
        plain = forms[0] if forms[0].path.endswith("Packages") else None
        if plain is not None:
            path = self.fetcher.cached(plain.sha256)
            if path is not None:
                with open(path, "rb") as file:
                    return file.read()
        last: SingularityError | None = None
        # A mirror need not have the plain form although its Release tells its checksum.
        for form in [form for form in forms if form is not plain] + ([plain] if plain is not None else []):
            try:
                data = self._fetch_index(release, base, form, plain)
            except NotFound as error:
                last = error
                continue
            if plain is not None:
                self.fetcher.keep(data, plain.sha256)
            return data
        raise last or UserError("no-component", f"{release.what}: has no packages for {component}")

    def _fetch_index(self, release: Release, base: str, form: IndexFile, plain: IndexFile | None) -> bytes:
        folder, _, name = form.path.rpartition("/")
        urls = [f"{base}/{form.path}"]
        if release.by_hash:
            urls.insert(0, f"{base}/{folder}/by-hash/SHA256/{form.sha256}")
        for number, url in enumerate(urls):
            try:
                found = self.fetcher.bring([Item(url, form.size, form.sha256, name)], f"fetching {form.path}")
                break
            except NotFound:
                if number + 1 == len(urls):
                    raise
        path = found[form.sha256]
        with open(path, "rb") as file:
            data = file.read()
        if name == "Packages":
            return data
        os.unlink(path)  # the plain form takes its place in the cache
        data = _inflate(data, plain.size if plain is not None else 4 * MAX_RELEASE * 8, f"{base}/{form.path}")
        if plain is not None and hashlib.sha256(data).hexdigest() != plain.sha256:
            raise UserError("wrong-content", f"{base}/{form.path}: its content has not the checksum of {release.what}")
        return data

    # -- packages -----------------------------------------------------------------------------------------------------

    def _choose(self, index: PackageIndex, merged: bool) -> tuple[list[Package], list[Package]]:
        """Return the packages of the smallest system, and the further ones that Include brings."""
        names = index.base()
        if not names:
            raise UserError("no-base", f"{self.sources[0].url}: {self.suite} has no essential or required packages")
        wanted = [*names, *(["apt"] if index.candidates("apt") else [])]
        # The empty package tells that there is nothing to merge; the other would drag in Perl to do it.
        if merged and index.candidates("usr-is-merged"):
            wanted.append("usr-is-merged")
        if any(source.url.startswith("https:") for source in self.sources) and index.candidates("ca-certificates"):
            wanted.append("ca-certificates")  # or apt in the image could not reach its own mirror
        solver = Solver(index, avoid=frozenset(("usrmerge",)))
        base = solver.solve([Relation(name) for name in wanted])
        include = []
        for word in self.request.header.get("include", "").replace(",", " ").split():
            match = _PACKAGE.fullmatch(word)
            if match is None:
                raise UserError("bad-keyword", f"Include: {word!r} is no name of a package")
            name, arch, version = match.groups()
            include.append(Relation(name, arch or "", "=" if version else "", version or ""))
        known = {package.name for package in base}
        every = solver.solve(include, base) if include else base
        return base, [package for package in every if package.name not in known]

    # -- the image ----------------------------------------------------------------------------------------------------

    def _devices(self, tree: Tree) -> None:
        for name in (b"dev/pts", b"dev/shm"):
            tree.folder(name)
        for name, target in _DEVICES:
            parent, _, _ = tree.place(b"dev/" + name)
            try:
                os.symlink(target, name, dir_fd=parent)
            except FileExistsError:
                pass

    def _write_sources(self, tree: Tree) -> None:
        """Let apt in the image use the sources that it was made from."""
        text = ""
        for source in self.sources:
            trust = self.trust[source]
            keyring = trust.keyring if trust.keyring.startswith("/") else ""
            if keyring and self.request.header.get("keyring"):
                keyring = self._bring_keyring(tree, keyring)
            if keyring and not tree.exists(os.fsencode(keyring[1:])):
                keyring = ""  # the image has the distribution's keys in its own place
            text += source.line(keyring, trusted=trust.state == "unsigned")
        tree.write(b"etc/apt/sources.list", text.encode())

    def _bring_keyring(self, tree: Tree, path: str) -> str:
        with open(path, "rb") as file:
            data = file.read(MAX_RELEASE)
        name = "build.asc" if data.lstrip().startswith(b"-----BEGIN") else "build.gpg"
        tree.write(f"etc/apt/keyrings/{name}".encode(), data)
        return f"/etc/apt/keyrings/{name}"

    def _describe(self) -> str:
        urls = dict.fromkeys(source.url for source in self.sources)
        return f"{self.suite} from {' '.join(urls)}"


def _bare(text: bytes) -> bytes:
    """Return the text of a clear-signed message whose signature does not count."""
    text = text.replace(b"\r\n", b"\n")
    if not text.startswith(b"-----BEGIN PGP SIGNED MESSAGE-----\n"):
        return text
    body = text.partition(b"\n\n")[2].partition(b"\n-----BEGIN PGP SIGNATURE-----")[0]
    return b"\n".join(line.removeprefix(b"- ") for line in body.split(b"\n"))


def _inflate(data: bytes, size: int, what: str) -> bytes:
    """Inflate an index of known size.

    Raises:
        UserError: it is damaged, or larger than promised.
    """
    from pysingularity.registry.inflate import Inflate

    at = 0

    def read(count: int) -> bytes:
        nonlocal at
        at += count
        return data[at - count : at]

    try:
        found = Inflate(read, what).read(size + 1)
    except HostError:
        raise
    except SingularityError as error:
        raise UserError("wrong-content", error.message) from None
    if len(found) > size:
        raise UserError("wrong-content", f"{what}: inflates to more than the {size} bytes that its Release promises")
    return found
