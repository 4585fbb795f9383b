"""The Triton kernels that inductor wrote, compiled for compute capability 9.0 without a GPU."""

import importlib.util
import re
from pathlib import Path

SOURCE = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.S)


def sources(code: str) -> dict[str, str]:
    """The Triton kernels in the Python that inductor wrote for a graph, by name."""
    return dict(SOURCE.findall(code))


def ptx(name: str, source: str, folder: Path) -> str:
    """What Triton makes of a kernel for the pretended device, in each of its configurations: inside
    of `inductor.stand_in()`, `source` becomes a module in `folder`."""
    path = folder / f"{name[:100]}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, name)
    kernel.precompile(warm_cache_only=True)
    return "\n".join(result.kernel.asm["ptx"] for result in kernel.compile_results)
