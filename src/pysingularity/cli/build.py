# SPDX-License-Identifier: Apache-2.0
"""`singularity build`: make an image from a definition file, an image, a sandbox or a reference."""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.cli.options import LIST, MANY, TEXT, Arguments, Option
from pysingularity.errors import ImageError, UsageError, UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pysingularity.build.log import Log
    from pysingularity.build.plan import Plan
    from pysingularity.build.request import BuildRequest, DockerBuild, Writer
    from pysingularity.recipe.model import Recipe
    from pysingularity.trust.encryption import Key, Seal

USAGE = "IMAGE SPEC"
COUNT = (2, 2)
HELP = """\
Make IMAGE from SPEC, which is a definition file, a Dockerfile, an image of any kind, a sandbox folder, or a reference
such as docker://debian:12. The result is one SIF file, or a folder with --sandbox. No root and no daemon is needed.

    singularity build demo.sif demo.def
    singularity build demo.sif Dockerfile
    singularity build --sandbox box demo.sif
    singularity build final.sif box
    singularity build debian.sif docker://debian:12

Programs of %post get proxy variables and, where it is needed, the host's certificate authorities (--ca-bundle).
"""
COMPRESSIONS = ("gzip", "zstd", "xz", "lz4", "lzo")
OPTIONS = (
    Option("sandbox", "Make a folder instead of a file", short="s", env=("SANDBOX",)),
    Option("force", "Replace what exists at IMAGE, and labels of the base image", short="F", env=("FORCE",)),
    Option("update", "Run the definition on the sandbox that exists at IMAGE", short="u", env=("UPDATE",)),
    Option("plan", "Print the steps and do nothing"),
    Option("json", "Print what happens as one JSON object per line on standard output", env=("JSON",)),
    Option(
        "section",
        "Follow only these sections (setup, post, files, environment, test, labels, none; all)",
        kind=LIST,
        metavar="NAMES",
        env=("SECTION",),
        default=("all",),
    ),
    Option("notest", "Leave %test out", short="T", env=("NOTEST",)),
    Option("build-arg", "Give a template its value", kind=MANY, metavar="NAME=VALUE"),
    Option("build-arg-file", "Read values of templates from a file", kind=TEXT, metavar="FILE"),
    Option("warn-unused-build-args", "Warn instead of giving up when a given value is not used"),
    Option("target", "Build this stage of a Dockerfile", kind=TEXT, metavar="STAGE"),
    Option("context", "Take what a Dockerfile copies from this folder instead of its own", kind=TEXT, metavar="DIR"),
    Option(
        "secret",
        "Give a secret to RUN --mount=type=secret of a Dockerfile",
        kind=MANY,
        metavar="id=NAME[,src=FILE|,env=VARIABLE]",
    ),
    Option("bind", "Bind a file or folder for %post and %test", short="B", kind=MANY, metavar="SRC[:DST[:OPTS]]"),
    Option("mount", "Bind for %post and %test, in the form type=bind,src=S,dst=D", kind=MANY, metavar="SPEC"),
    Option("nv", "Bring the NVIDIA driver's libraries into %post and %test", env=("NV",)),
    Option("ca-bundle", "Certificates for %post: auto, host, no or FILE", kind=TEXT, env=("BUILD_CA_BUNDLE",)),
    Option("writable-tmpfs", "Let %test write; what it writes is dropped", env=("WRITABLE_TMPFS",)),
    Option("debug-shell", "Open a shell in the container when %post fails"),
    Option(
        "fakeroot", "Keep owners when an image is unpacked; builds of recipes always do", short="f", env=("FAKEROOT",)
    ),
    Option("fix-perms", "Make everything in the image readable and writable for its owner", env=("FIXPERMS",)),
    Option("compress", "Compress with this method", kind=TEXT, metavar="METHOD", choices=COMPRESSIONS),
    Option("level", "Compress with this effort", kind=TEXT, metavar="N"),
    Option(
        "mksquashfs-args",
        "Options of mksquashfs: -comp, -Xcompression-level, -b, -processors",
        kind=TEXT,
        metavar="WORDS",
        env=("MKSQUASHFS_ARGS",),
    ),
    Option("arch", "Build for another architecture", kind=TEXT, metavar="NAME", env=("BUILD_ARCH",)),
    Option("no-verify", "Go on when a mirror's signature is missing or wrong", env=("NO_VERIFY",)),
    Option("disable-cache", "Fetch everything again and keep nothing", env=("DISABLE_CACHE",)),
    Option("no-cache", "Use no cached steps and keep none", env=("NO_CACHE",)),
    Option("no-cleanup", "Keep temporary files when the build fails", env=("NO_CLEANUP",)),
    Option("no-https", "Use plain http for registries", env=("NO_HTTPS", "NOHTTPS"), aliases=("nohttps",)),
    Option(
        "docker-username", "Name for a registry", kind=TEXT, env=("DOCKER_USERNAME",), bare_env=("DOCKER_USERNAME",)
    ),
    Option(
        "docker-password", "Password for a registry", kind=TEXT, env=("DOCKER_PASSWORD",), bare_env=("DOCKER_PASSWORD",)
    ),
    Option("authfile", "Read credentials of registries from this file", kind=TEXT, metavar="FILE", env=("AUTH_FILE",)),
    Option("library", "URL of the library", kind=TEXT, metavar="URL", env=("LIBRARY",)),
    Option("encrypt", "Encrypt the image; the key comes from the next two options or their variables", short="e"),
    Option("passphrase", "Ask for the passphrase to encrypt with (or set SINGULARITY_ENCRYPTION_PASSPHRASE)"),
    Option(
        "pem-path",
        "Encrypt for the public RSA key in FILE (or set SINGULARITY_ENCRYPTION_PEM_PATH)",
        kind=TEXT,
        metavar="FILE",
    ),
    # Known to other implementations; refused with a reason in `_refuse`.
    Option("remote", "Build elsewhere", short="r", hidden=True),
    Option("rocm", "Bring the ROCm driver in", hidden=True),
    Option("nvccli", "Use nvidia-container-cli", hidden=True),
    Option("docker-login", "Ask for a registry's password", hidden=True),
    Option("arch-variant", "Variant of the architecture", kind=TEXT, hidden=True),
    Option("userns", "Build in a user namespace", hidden=True),
    Option("ignore-subuid", "Use no subordinate ids", hidden=True),
)
#: Options that are understood and not there yet: what to do instead.
MISSING = {
    "remote": "there is no remote builder; every build runs here, without root",
    "rocm": "--rocm is not there for builds; bind what %post needs with --bind",
    "nvccli": "nvidia-container-cli is not used; --nv does without it",
    "docker-login": "log in first: singularity registry login",
    "arch-variant": "variants cannot be chosen in this version; name the image's digest instead",
}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i386": "386", "i686": "386"}


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Build the image."""
    for name, why in MISSING.items():
        if getattr(arguments, name.replace("-", "_")):
            raise UserError("not-available", f"--{name}: {why}")
    asked = request(arguments, environ)
    from pysingularity.build import plan  # from here on everything is heavy anyway

    steps = plan.make(asked)
    if arguments.plan:
        _print_plan(asked, steps, as_json=bool(arguments.json))
        return 0
    from pysingularity import terminal
    from pysingularity.build.execute import build
    from pysingularity.build.log import Log
    from pysingularity.build.worker import failure
    from pysingularity.errors import SingularityError
    from pysingularity.events import Event
    from pysingularity.image.output import Terminated

    log = Log(environ, asked.target, terminal.listener(as_json=bool(arguments.json)))
    try:
        build(asked, steps, log)
    except SingularityError as error:
        log(
            Event(
                "failed",
                {**failure(error).fields, "message": str(error).partition("\n    hint: ")[0], "log": log.useful()},
            )
        )
        _tell_log(log)
        raise
    except Terminated as stopped:
        from signal import Signals

        name = Signals(stopped.number).name
        text = f"stopped by {name}; nothing was written"
        log(Event("failed", {"id": "stopped", "message": text, "hint": "", "log": log.useful()}))
        _tell_log(log)
        messages.fatal(f"{text}\n    hint: give the same command to start again")
        return 255
    log.drop()
    return 0


def _tell_log(log: Log) -> None:
    path = log.keep()
    if path:
        messages.info(f"the whole log is kept in {path}")


def _print_plan(asked: BuildRequest, steps: Plan, *, as_json: bool) -> None:
    from pysingularity.build.steps import cached

    there = cached(asked, steps)
    if as_json:
        from pysingularity.cli.results import write_json

        write_json({"steps": [{**step.value(), "cached": step.number in there} for step in steps.steps]})
        return
    for step in steps.steps:
        print(step.describe(cached=step.number in there))


def request(arguments: Arguments, environ: dict[str, str]) -> BuildRequest:
    """Return what the command line asks for, after looking at the target and at what is to be built.

    Raises:
        UserError: the target cannot be written, the recipe is wrong, nothing is there to build from.
    """
    from pysingularity.build.request import RECIPE, BuildRequest
    from pysingularity.build.sections import Wanted
    from pysingularity.image.output import check_target

    target, spec = (str(word) for word in arguments.positional)
    sandbox, update = bool(arguments.sandbox), bool(arguments.update)
    if update and not sandbox:
        raise UsageError("update-sandbox", "--update works on sandboxes", hint="add --sandbox")
    target = os.path.abspath(target)
    if not arguments.plan:
        check_target(target, force=bool(arguments.force) or update, folder=sandbox)
        _check_replaced(target, sandbox=sandbox, update=update)
    spec, kind, recipe, docker = _kind(spec, arguments, environ)
    if update and (kind != RECIPE or not os.path.isdir(target)):
        raise UserError("update-sandbox", "--update needs a definition file and an existing sandbox")
    machine = os.uname().machine
    own = ARCHITECTURES.get(machine, machine)
    arch = ARCHITECTURES.get(str(arguments.arch), str(arguments.arch)) if arguments.arch else own
    if docker is not None and (update or _sections(arguments.section) not in ([], ["all"])):
        raise UserError("dockerfile-option", f"{spec}: --update and --section are for definition files")
    if arch != own and kind == RECIPE:
        _check_arch(arch, own, recipe)
    options: dict[str, object] = {}
    for name in ("no-verify", "no-https", "disable-cache", "force"):
        if getattr(arguments, name.replace("-", "_")):
            options[name] = True
    for name in ("docker-username", "docker-password", "authfile", "library"):
        value = getattr(arguments, name.replace("-", "_"))
        if value:
            options[name] = value
    options["arch"] = arch
    key, seal = _keys(arguments, environ)
    # What is encrypted, or comes out of what is, does not stay in the cache in the clear.
    secret = seal is not None or (key is not None and _may_be_encrypted(recipe))
    if key is not None:
        options["key"] = key
    return BuildRequest(
        target=target,
        spec=spec,
        kind=kind,
        recipe=recipe,
        sandbox=sandbox,
        force=bool(arguments.force),
        update=update,
        wanted=Wanted(_sections(arguments.section)),
        notest=bool(arguments.notest),
        fakeroot=bool(arguments.fakeroot),
        fix_perms=bool(arguments.fix_perms),
        cleanup=not arguments.no_cleanup,
        nv=bool(arguments.nv),
        writable_tmpfs=bool(arguments.writable_tmpfs),
        binds=tuple(_words(arguments.bind)),
        mounts=tuple(_words(arguments.mount)),
        ca_bundle=str(arguments.ca_bundle or "auto"),
        arch=arch,
        writer=_writer(arguments),
        directory=os.getcwd(),
        environ=environ,
        options=options,
        debug_shell=bool(arguments.debug_shell),
        cache=not arguments.no_cache and not arguments.disable_cache and not secret,
        docker=docker,
        seal=seal,
    )


def _keys(arguments: Arguments, environ: dict[str, str]) -> tuple[Key | None, Seal | None]:
    """Return the key that was given, which also opens encrypted images that are built from, and what encrypts.

    Raises:
        UserError: no key for --encrypt, or none that it can be done with.
    """
    names = ("ENCRYPTION_PASSPHRASE", "ENCRYPTION_PEM_PATH", "ENCRYPTION_PEM_DATA")
    variables = any(environ.get(prefix + name) for prefix in ("SINGULARITY_", "APPTAINER_") for name in names)
    given = bool(arguments.passphrase or arguments.pem_path)
    if not (arguments.encrypt or given or variables):
        return None, None
    from pysingularity.terminal import ask_passphrase
    from pysingularity.trust.encryption import Seal, key_of

    if arguments.sandbox and arguments.encrypt:
        raise UserError("encrypted-sandbox", "--encrypt: a folder is not encrypted", hint="leave --sandbox out")
    encrypt = bool(arguments.encrypt) or (given and not arguments.sandbox)
    ask = (lambda: ask_passphrase(twice=encrypt)) if arguments.passphrase else None
    key = key_of(environ, pem_path=str(arguments.pem_path or ""), ask=None if arguments.plan else ask)
    if not encrypt:
        if not arguments.sandbox:
            messages.warning("a key is given and --encrypt is not: the image is NOT encrypted")
        return key, None
    if key is None and not arguments.plan:
        raise UserError(
            "needs-key",
            "--encrypt: no key was given",
            hint="add --passphrase or --pem-path FILE, or set SINGULARITY_ENCRYPTION_PASSPHRASE",
        )
    return key, Seal(key) if key is not None else None


def _may_be_encrypted(recipe: Recipe | None) -> bool:
    """Return whether a base of the recipe may be an encrypted image."""
    return any(stage.agent in ("localimage", "oras", "library", "shub") for stage in (recipe.stages if recipe else ()))


def _words(value: object) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else []


def _sections(value: object) -> list[str]:
    from pysingularity.recipe.model import SECTIONS

    names = [name.lower().lstrip("%") for name in _words(value)]
    for name in names:
        if name not in (*SECTIONS, "all", "none"):
            from pysingularity.cli.suggest import nearest

            guess = nearest(name, [*SECTIONS, "all", "none"])
            hint = f"did you mean {guess}?" if guess else "sections: " + ", ".join(SECTIONS)
            raise UsageError("unknown-section", f"--section {name}: there is no such section", hint=hint)
    return names


def _check_replaced(target: str, *, sandbox: bool, update: bool) -> None:
    """Refuse to replace a folder that is no sandbox: --force on a home folder is a slip, not a wish."""
    if not sandbox or not os.path.isdir(target):
        return
    from pysingularity.build.space import is_sandbox

    if not is_sandbox(target):
        what = "updated" if update else "replaced"
        raise UserError(
            "not-a-sandbox", f"{target}: is no sandbox, and is not {what}", hint="remove it yourself if you mean it"
        )


def _kind(
    spec: str, arguments: Arguments, environ: dict[str, str]
) -> tuple[str, str, Recipe | None, DockerBuild | None]:
    """Return what is to be built: its path, what it is, and what it says when it is a recipe or Dockerfile."""
    from pysingularity.build.request import IMAGE, RECIPE, REFERENCE, SANDBOX
    from pysingularity.reference import has_scheme, parse_reference

    kind = ""
    if has_scheme(spec) and not os.path.exists(spec):
        if parse_reference(spec).scheme == "instance":
            raise UserError("instance", f"{spec}: an instance cannot be built from; name its image")
        kind = REFERENCE
    elif os.path.isdir(spec):
        inner = os.path.join(spec, "Dockerfile")
        if not os.path.isfile(inner) or _is_root(spec):
            kind = SANDBOX
        spec = spec if kind else inner
    elif _is_image(spec):
        kind = IMAGE
    if kind:
        for name in ("build-arg", "build-arg-file", "target", "context", "secret"):
            if getattr(arguments, name.replace("-", "_")):
                raise UserError(name, f"--{name} is for {'definition files' if 'arg' in name else 'Dockerfiles'}")
        return spec, kind, None, None
    from pysingularity.cli import dockerfile  # only for builds from text
    from pysingularity.recipe.dockerfile import looks_like

    text = read_text(spec)
    if looks_like(text[:65536].decode("utf-8", "surrogateescape"), spec):
        docker = dockerfile.request(text, spec, arguments, environ)
        return spec, RECIPE, dockerfile.stages(docker, arguments), docker
    for name in ("target", "context", "secret"):
        if getattr(arguments, name):
            raise UserError(name, f"--{name} is for Dockerfiles, and {spec} is a definition file")
    return spec, RECIPE, read_recipe(text, spec, arguments), None


def _is_root(path: str) -> bool:
    """Return whether a folder is a root file system."""
    names = set(os.listdir(path))
    return ".singularity.d" in names or {"etc", "usr", "bin"} <= names


def _is_image(path: str) -> bool:
    from pysingularity.image.open import open_image

    try:
        with open_image(path):
            return True
    except ImageError as error:
        if error.id == "no-such-image":
            raise UserError(
                "no-such-spec", f"{path}: there is no such file", hint="SPEC comes second: singularity build IMAGE SPEC"
            ) from None
        if error.id != "unknown-format":
            raise
    return False


def read_text(path: str) -> bytes:
    """Return the text of a recipe, one byte more than allowed when it is too large."""
    from pysingularity.recipe.parser import LARGEST

    try:
        with open(path, "rb") as stream:
            return stream.read(LARGEST + 1)
    except OSError as error:
        raise UserError("unreadable-recipe", f"{path}: cannot be read: {(error.strerror or '').lower()}") from None


def read_recipe(text: bytes, path: str, arguments: Arguments) -> Recipe:
    """Return the recipe in the text of a definition file.

    Raises:
        RecipeError: with the place of what is wrong.
    """
    from pysingularity.recipe import templates
    from pysingularity.recipe.parser import parse
    from pysingularity.recipe.sections import check, file_pairs

    values = templates.from_options(_words(arguments.build_arg), str(arguments.build_arg_file or ""))
    recipe = parse(text, path, values)
    check(recipe)
    for stage in recipe.stages:
        file_pairs(stage, path)
        for app in stage.apps:
            file_pairs(stage, path, app)
        from pysingularity.build import bootstrap

        try:
            bootstrap.known(stage.agent)
        except UserError as error:
            from pysingularity.errors import RecipeError

            line = stage.lines.get("bootstrap", stage.line)
            raise RecipeError(error.id, error.message, file=path, line=line, hint=error.hint) from None
    for remark in recipe.remarks:
        messages.warning(remark)
    if recipe.unused:
        text_ = f"these build arguments are not used in {path}: {', '.join(recipe.unused)}"
        if not arguments.warn_unused_build_args:
            raise UserError("unused-build-arg", text_, hint="correct the name, or give --warn-unused-build-args")
        messages.warning(text_)
    return recipe


def _check_arch(arch: str, own: str, recipe: Recipe | None) -> None:
    """Refuse to run programs of an architecture that neither the processor nor an emulator understands.

    Raises:
        UserError: says what is missing.
    """
    from pysingularity.build import foreign
    from pysingularity.build.bootstrap import RUN_NOTHING

    for stage in recipe.stages if recipe else []:
        scripts = any(section.name in ("post", "test", "appinstall") for section in stage.sections)
        if scripts or stage.agent not in RUN_NOTHING:
            foreign.check(arch, own)
            return


def _writer(arguments: Arguments) -> Writer:
    """Return how to compress, from --compress and --level or from mksquashfs's options.

    Raises:
        UsageError: an option of mksquashfs that our writer has no counterpart for.
    """
    import shlex

    from pysingularity.build.request import Writer

    compression, level = str(arguments.compress or ""), _number(arguments.level, "--level")
    block, threads = 131072, None
    words = shlex.split(str(arguments.mksquashfs_args or ""))
    at = 0
    while at < len(words):
        word = words[at]
        value = words[at + 1] if at + 1 < len(words) else ""
        at += 2
        if word == "-comp" and value in COMPRESSIONS:
            compression = value
        elif word == "-Xcompression-level":
            level = _number(value, word)
        elif word == "-b":
            block = _size(value)
        elif word in ("-processors", "-mem-percent", "-mem"):
            threads = _number(value, word) if word == "-processors" else threads
        elif word in ("-noappend", "-no-progress", "-all-root", "-no-duplicates", "-quiet"):
            at -= 1
        else:
            raise UsageError(
                "mksquashfs-args",
                f"--mksquashfs-args: {word} {value}".rstrip() + " has no counterpart in our writer",
                hint="understood: -comp METHOD, -Xcompression-level N, -b SIZE, -processors N",
            )
    if level is not None and not compression:
        compression = "gzip"
    return Writer(compression, level, block, threads)


def _number(value: object, spelling: str) -> int | None:
    if value is None:
        return None
    text = str(value)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UsageError("bad-number", f"{spelling} {text}: is no number from 1")
    return int(text)


def _size(text: str) -> int:
    unit = {"K": 1024, "M": 1 << 20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    size = int(digits) * unit if digits.isdigit() else 0
    if not 4096 <= size <= 1 << 20 or size & (size - 1):
        raise UsageError("block-size", f"-b {text}: a block is a power of two from 4K to 1M")
    return size
