"""Triton's interface of a compiler, without a compiler."""

from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class Interpreted(BaseBackend):
    """Never called: with TRITON_INTERPRET=1 no kernel is compiled."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise RuntimeError("kernels are interpreted, so set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, *language: Any) -> None:
        raise RuntimeError("kernels are interpreted, so set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        pass

    def get_module_map(self) -> dict[str, Any]:
        return {}
