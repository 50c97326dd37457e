"""Devices to compile for; the compilers for TPU and CUDA need no chip."""

import dataclasses
import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

# Read by libtpu when it is loaded: it must neither query a cloud's metadata server nor lock a chip.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip to compile for.

    Attributes:
        name: on the page.
        topology: of TPUs, as libtpu names it; "" for others.
        description: of a GPU, as XLA takes it; "" for others.
        bandwidth: of the chip's memory, bytes a second, as its maker states it.
        issue: instructions of single elements a second: processors x schedulers x lanes x clock.
        clock: of a TPU, Hz, where its stated peak of matrix products and the number and size of its
            matrix units tell.
    """

    name: str
    topology: str = ""
    description: str = ""
    bandwidth: float = 0.0
    issue: float = 0.0
    clock: float = 0.0


def _gpu(
    name: str, capability: int, cores: int, bandwidth: float, l2: int, memory: int, clock: float
) -> str:
    """The description of a GPU that XLA's compiler for CUDA needs."""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
device_description_str: "{name}" runtime_version {{ major: 12 minor: 9 }}"""


# The GPUs are as in XLA's own descriptions (its target_config/specs).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", topology="v5e:2x2", bandwidth=819e9, clock=1.5e9),
        Chip("v6e", topology="v6e:2x2", bandwidth=1638e9),
        Chip("v5p", topology="v5p:2x2x1", bandwidth=2765e9, clock=1.75e9),
        Chip(
            "H100",
            description=_gpu(
                "NVIDIA H100 80GB HBM3", 9, 132, 3.35232e12, 52428800, 84942979072, 1.98
            ),
            bandwidth=3.35e12,
            issue=132 * 4 * 32 * 1.755e9,
        ),
        Chip(
            "B200",
            description=_gpu("NVIDIA B200", 10, 148, 7.67232e12, 132644864, 191514411008, 1.965),
            bandwidth=7.67e12,
            issue=148 * 4 * 32 * 1.965e9,
        ),
        Chip("CPU"),
    )
}
TPUS = tuple(chip.name for chip in CHIPS.values() if chip.topology)
GPUS = tuple(chip.name for chip in CHIPS.values() if chip.description)


def prepare(dump: Path | None = None) -> None:
    """Sets what the compilers read when they are loaded. Call it before importing JAX.

    Args:
        dump: folder for the scheduled code of each kernel, written by libtpu; none by default.
    """
    os.environ.update(LIBTPU, JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if dump is not None:
        flags = {"to": dump, "llo_text": "true", "llo_pass_label_regex": "final_bundles"}
        words = [f"--xla_jf_dump_{name}={value}" for name, value in flags.items()]
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(words)


@functools.cache
def device(name: str) -> Any:
    """A device of a chip, for the sharding of abstract arrays; the CPU's is a real one."""
    import jax
    from jax.experimental import topologies

    chip = CHIPS[name]
    if chip.topology:
        return topologies.get_topology_desc(chip.topology, "tpu").devices[0]
    return _cuda(chip.description) if chip.description else jax.devices("cpu")[0]


def _cuda(description: str) -> Any:
    # The public API makes a client first, which needs a GPU.
    import jax
    from jax.experimental import topologies

    internal: Any = importlib.import_module("jax._src.lib")
    client = internal.xla_client
    jax.devices("cpu")  # Finds plugins first: it would complain about one that is already loaded.
    if not client.pjrt_plugin_loaded("cuda"):
        client.load_pjrt_plugin_dynamically("cuda", str(_plugin()))
    if not client.pjrt_plugin_initialized("cuda"):
        client.initialize_pjrt_plugin("cuda")
    options = {"target_config": description, "topology": "1x1x1"}
    found = internal._jax.get_default_c_api_topology("cuda", "1x1x1", options)
    return topologies.TopologyDescription(found._make_compile_only_devices()).devices[0]


def _plugin() -> Path:
    spec = importlib.util.find_spec("jax_plugins")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders for path in Path(folder).glob("*/xla_cuda_plugin.so")]
    if not found:
        raise ModuleNotFoundError("no compiler for CUDA: `make accelerators` installs it")
    return found[0]
