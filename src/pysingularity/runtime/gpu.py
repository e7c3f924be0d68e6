# SPDX-License-Identifier: Apache-2.0
"""What --nv, --rocm and --device bring into a container: libraries, programs, data files, sockets and device nodes.

Everything is decided here as values from a look at the host; binding is the caller's. Libraries come from the linker's
cache (read by ourselves, 1 ms, instead of `ldconfig -p`); a library that needs a newer glibc than the image has is left
out with a reason, because loading it would end the program. Devices may also come from Container Device Interface
files (CDI specification 0.6, section "cdiVersion"). Loaded only when one of the options is given.
"""

from __future__ import annotations

import os

from pysingularity.errors import HostError, UserError
from pysingularity.runtime import elf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Where libraries appear in the container; LD_LIBRARY_PATH names it last.
LIBRARIES = "/.singularity.d/libs"

NVIDIA_LIBRARIES = (
    "libcuda libcudadebugger libEGL_nvidia libEGL_installertest libGLESv1_CM_nvidia libGLESv2_nvidia libGLX_nvidia "
    "libGLX_installertest libGLX_indirect libnvcuvid libnvidia-allocator libnvidia-api libnvidia-cbl libnvidia-cfg "
    "libnvidia-compiler libnvidia-eglcore libnvidia-egl-gbm libnvidia-egl-wayland libnvidia-egl-xcb "
    "libnvidia-egl-xlib libnvidia-encode libnvidia-fatbinaryloader libnvidia-fbc libnvidia-glcore libnvidia-glsi "
    "libnvidia-glvkspirv libnvidia-gpucomp libnvidia-gtk2 libnvidia-gtk3 libnvidia-ifr libnvidia-ml libnvidia-ngx "
    "libnvidia-nscq libnvidia-nvvm libnvidia-opencl libnvidia-opticalflow libnvidia-pkcs11 "
    "libnvidia-pkcs11-openssl3 libnvidia-ptxjitcompiler libnvidia-rtcore libnvidia-sandboxutils libnvidia-tls "
    "libnvidia-tileiras libnvidia-vksc-core libnvidia-wayland-client libnvidia-wfb libnvoptix libvdpau_nvidia "
    "libEGL libGL libGLdispatch libGLESv1_CM libGLESv2 libGLX libOpenCL libOpenGL"
).split()
ROCM_LIBRARIES = (
    "libamd_comgr libamdhip64 libamdocl64 libamdocl12cl64 libcltrace libdrm libdrm_amdgpu libdrm_radeon libelf "
    "libhipblas libhipblaslt libhipfft libhiprand libhipsolver libhipsparse libhiprtc libhsa-amd-aqlprofile64 "
    "libhsa-runtime64 libhsakmt libMIOpen libnuma libOpenCL libopencl librccl librocblas librocfft "
    "librocm-core librocm_smi64 librocrand librocsolver librocsparse libamd_smi librocprofiler64 libroctracer64 "
    "libroctx64"
).split()
NVIDIA_PROGRAMS = (
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
)
ROCM_PROGRAMS = ("rocminfo", "rocm-smi", "amd-smi", "rocm_agent_enumerator", "clinfo")
NVIDIA_FILES = (
    "/usr/share/glvnd/egl_vendor.d/10_nvidia.json",
    "/etc/glvnd/egl_vendor.d/10_nvidia.json",
    "/usr/share/egl/egl_external_platform.d/10_nvidia_wayland.json",
    "/usr/share/egl/egl_external_platform.d/15_nvidia_gbm.json",
    "/usr/share/egl/egl_external_platform.d/20_nvidia_xcb.json",
    "/usr/share/egl/egl_external_platform.d/20_nvidia_xlib.json",
    "/usr/share/vulkan/icd.d/nvidia_icd.json",
    "/etc/vulkan/icd.d/nvidia_icd.json",
    "/usr/share/vulkan/implicit_layer.d/nvidia_layers.json",
    "/etc/vulkan/implicit_layer.d/nvidia_layers.json",
    "/usr/share/nvidia/nvoptix.bin",
    "/etc/OpenCL/vendors/nvidia.icd",
)
ROCM_FILES = ("/etc/OpenCL/vendors/amdocl64.icd", "/opt/amdgpu/share/libdrm/amdgpu.ids")
NVIDIA_SOCKETS = ("/run/nvidia-persistenced/socket", "/var/run/nvidia-persistenced/socket", "/run/nvidia-fabricmanager")
#: The host's C library must never enter a container: its loader and library belong together.
NEVER = {"libc", "libm", "libdl", "libpthread", "librt", "libresolv", "ld-linux-x86-64", "libstdc++", "libgcc_s"}


class Gpu:
    """What one kind of accelerator needs.

    Attributes:
        kind: "nvidia" or "rocm", or the names of CDI devices.
        libraries: (soname or file name, path on the host); to be bound below `LIBRARIES`.
        files: (path on the host, path in the container) of programs, data files and sockets.
        devices: device nodes that a container with a /dev of its own needs.
        environment: variables to set.
        left_out: (name, reason) of libraries that were found and cannot be used.
        missing: reasons why the accelerator as a whole seems absent; worth one warning.
    """

    __slots__ = ("devices", "environment", "files", "kind", "left_out", "libraries", "missing")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.libraries: list[tuple[str, str]] = []
        self.files: list[tuple[str, str]] = []
        self.devices: list[str] = []
        self.environment: dict[str, str] = {}
        self.left_out: list[tuple[str, str]] = []
        self.missing: list[str] = []

    def __repr__(self) -> str:
        return f"Gpu({self.kind}, {len(self.libraries)} libraries, {self.devices})"

    def for_image(self, libc: bytes | None) -> None:
        """Leave out the libraries that the image cannot load.

        Arguments:
            libc: the bytes of the image's libc.so.6; None when it has none (musl, or no C library at all).
        """
        provided = elf.glibc(elf.versions(libc, elf.VERDEF)) if libc else None
        kept = []
        for name, path in self.libraries:
            needed = elf.glibc(elf.versions(read(path), elf.VERNEED))
            if needed is None or (provided is not None and needed <= provided):
                kept.append((name, path))
            else:
                have = f"glibc {provided[0]}.{provided[1]}" if provided else "no glibc"
                self.left_out.append((name, f"needs glibc {needed[0]}.{needed[1]}, the image has {have}"))
        self.libraries = kept


def nvidia(root: str = "", machine: str = "") -> Gpu:
    """Return what --nv brings from this host.

    Arguments:
        root: prefix of every path looked at (for tests).
        machine: as in uname; this machine's by default.
    """
    gpu = Gpu("nvidia")
    gpu.libraries = libraries(NVIDIA_LIBRARIES, root, machine)
    gpu.files = programs(NVIDIA_PROGRAMS, root)
    gpu.files += [(root + path, path) for path in NVIDIA_FILES + NVIDIA_SOCKETS if os.path.exists(root + path)]
    pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    if os.path.isdir(root + pipe):
        gpu.files.append((root + pipe, pipe))
    gpu.devices = nodes(("nvidia",), root) + nodes(("dri",), root)
    if not any(name.startswith("libcuda.") for name, _ in gpu.libraries):
        gpu.missing.append("no libcuda in the linker's cache (is the driver installed?)")
    if not any(os.path.basename(path)[6:].isdigit() for path in gpu.devices if "/nvidia" in path):
        gpu.missing.append("no /dev/nvidia* device")
    return gpu


def rocm(root: str = "", machine: str = "") -> Gpu:
    """Return what --rocm brings from this host; arguments as for `nvidia`."""
    gpu = Gpu("rocm")
    gpu.libraries = libraries(ROCM_LIBRARIES, root, machine)
    gpu.files = programs(ROCM_PROGRAMS, root)
    gpu.files += [(root + path, path) for path in ROCM_FILES if os.path.exists(root + path)]
    gpu.devices = nodes(("kfd",), root) + nodes(("dri",), root)
    if not any(path.endswith("/kfd") for path in gpu.devices):
        gpu.missing.append("no /dev/kfd device")
    return gpu


def read(path: str) -> bytes:
    """Return the content of a file, or nothing when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def libraries(names: list[str], root: str = "", machine: str = "") -> list[tuple[str, str]]:
    """Return (name in the container, path on the host) of the libraries with these stems that the linker knows.

    Each library comes under its soname and, where a link to it has the plain name ("libcuda.so"), under that as well.
    """
    data = read(root + "/etc/ld.so.cache")
    try:
        cache = elf.parse_cache(data, machine or os.uname().machine) if data else {}
    except ValueError:
        cache = {}
    wanted = set(names) - NEVER
    found = {}
    for soname, paths in cache.items():
        stem, dot, _ = soname.partition(".so")
        if dot and stem in wanted and os.path.exists(root + paths[0]):
            found[soname] = root + paths[0]
    return sorted(found.items())


def programs(names: tuple[str, ...], root: str = "") -> list[tuple[str, str]]:
    """Return (path on the host, path in the container) of the programs that the host has."""
    found = []
    for name in names:
        for folder in ("/usr/bin", "/usr/local/bin", "/bin", "/usr/sbin", "/opt/rocm/bin"):
            path = f"{root}{folder}/{name}"
            if os.path.isfile(path) and os.access(path, os.X_OK):
                found.append((path, f"/usr/bin/{name}"))
                break
    return found


def nodes(prefixes: tuple[str, ...], root: str = "") -> list[str]:
    """Return the paths below /dev whose names start with a prefix, without the root they were looked for under."""
    try:
        names = sorted(os.listdir(root + "/dev"))
    except OSError:
        return []
    return [f"/dev/{name}" for name in names if name.startswith(prefixes)]


def cdi(names: list[str], folders: list[str]) -> Gpu:
    """Return what Container Device Interface devices ("nvidia.com/gpu=0", "vendor.com/class=all") need.

    Arguments:
        names: fully qualified device names.
        folders: where specifications lie, the most important last.

    Raises:
        UserError: a name is malformed or no specification has the device.
        HostError: a specification cannot be read.
    """
    gpu = Gpu(", ".join(names))
    specifications = [spec for folder in folders for spec in _specifications(folder)]
    for name in names:
        kind, equals, wanted = name.partition("=")
        if not equals or "/" not in kind or not wanted:
            raise UserError("bad-device", f"--device {name}: not of the form VENDOR/CLASS=NAME")
        matching = [spec for spec in specifications if spec.get("kind") == kind]
        devices = {device.get("name"): (spec, device) for spec in matching for device in spec.get("devices", [])}
        if wanted not in devices:
            known = ", ".join(sorted(f"{kind}={known}" for known in devices)) or "none"
            raise UserError(
                "no-such-device",
                f"--device {name}: no such device in {', '.join(folders)}",
                hint=f"known devices of this kind: {known}",
            )
        spec, device = devices[wanted]
        for edits in (spec.get("containerEdits"), device.get("containerEdits")):
            _edit(gpu, edits or {})
    return gpu


def _edit(gpu: Gpu, edits: dict[str, Any]) -> None:
    """Add the edits of a specification (CDI 0.6, "OCI Edits").

    Hooks are programs of the vendor that change the container's files from outside, which nobody but root may let them
    do. NVIDIA's only make links to libraries and renew the linker's cache: both are done here by binding libraries
    under their own names into a folder of LD_LIBRARY_PATH.
    """
    for node in edits.get("deviceNodes") or []:
        source = node.get("hostPath") or node["path"]
        if source == node["path"]:
            gpu.devices.append(source)
        else:
            gpu.files.append((source, node["path"]))
    libraries = {}
    for mount in edits.get("mounts") or []:
        source, target = mount["hostPath"], mount["containerPath"]
        gpu.files.append((source, target))
        if ".so" in os.path.basename(target):
            libraries[target] = source
            name = elf.soname(read(source))
            if name and "/" not in name and name not in dict(gpu.libraries):
                gpu.libraries.append((name, source))
    for link, target in _links(edits.get("hooks") or []):
        source = _behind(link, target, libraries)
        name = os.path.basename(link)
        if source and ".so" in name and name not in dict(gpu.libraries):
            gpu.libraries.append((name, source))
    for text in edits.get("env") or []:
        name, _, value = text.partition("=")
        gpu.environment[name] = value


def _links(hooks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (link, target) of the create-symlinks hooks, whose arguments are "--link TARGET::LINK"."""
    found = []
    for hook in hooks:
        words = [str(word) for word in hook.get("args") or []]
        if "create-symlinks" not in words:
            continue
        for at, word in enumerate(words):
            text = words[at + 1] if word == "--link" and at + 1 < len(words) else word.removeprefix("--link=")
            target, colons, link = text.partition("::")
            if colons and word.startswith("--link"):
                found.append((link, target))
    return found


def _behind(link: str, target: str, libraries: dict[str, str]) -> str:
    """Return the library of the host that a link stands for: the one mounted at its target, or known by that name."""
    path = os.path.normpath(os.path.join(os.path.dirname(link), target))
    if path in libraries:
        return libraries[path]
    for source in libraries.values():
        if elf.soname(read(source)) == os.path.basename(target):
            return source
    return ""


def _specifications(folder: str) -> list[dict[str, Any]]:
    import json

    found = []
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(".json"):
            try:
                value = json.loads(read(path))
            except ValueError as error:
                raise HostError("bad-cdi", f"{path}: not a CDI specification: {error}") from None
        elif name.endswith((".yaml", ".yml")):
            value = _yaml(path)
        else:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _yaml(path: str) -> object:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise HostError(
            "no-yaml",
            f"{path}: reading a specification in YAML needs the Python package pyyaml",
            hint="install pyyaml beside pysingularity, or write the specification as JSON (nvidia-ctk cdi generate)",
        ) from None
    try:
        return yaml.safe_load(read(path))
    except yaml.YAMLError as error:
        raise HostError("bad-cdi", f"{path}: not a CDI specification: {error}") from None
