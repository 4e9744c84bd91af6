"""Builds llmsys/_C with CMake and ninja. Needs neither torch nor nvcc nor a GPU.

CMake cache variables (CMakeLists.txt documents them) pass through CMAKE_ARGS, as in
`CMAKE_ARGS="-DLLMSYS_CUDA=OFF" pip install .`
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if shutil.which("c++") is None and "CXX" not in os.environ:
            raise SystemExit("llmsys.setup: no C++ compiler found, expected one with C++17; install g++ or set CXX")
        destination = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)


setup(ext_modules=[Extension("llmsys._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
