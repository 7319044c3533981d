"""Fake TensorRT: a parser and a builder that follow a test's script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class Script:
    """Scripted events: lines logged while parsing, (node, operator, text) of parser errors, lines
    logged as errors while building, pieces of the engine, layer types. inspected: JSON of the
    engine inspector, which takes a GPU; None for an engine that cannot be loaded."""

    parse_lines: Sequence[tuple[str, str]] = ()
    parse_errors: Sequence[tuple[str, str, str]] = ()
    build_errors: Sequence[str] = ()
    pieces: Sequence[bytes] = (b"eng", b"ine")
    layers: Sequence[str] = ("PLUGIN_V3", "CAST", "CAST")
    steps: int = 2
    inspected: str | None = None
    seen: dict[str, Any] = field(default_factory=dict)


def fake_tensorrt(script: Script, version: str = "1.7.1") -> Any:
    """A module like `tensorrt_rtx`."""

    class Base:
        def __init__(self) -> None: ...

    class Layer(SimpleNamespace): ...

    class GridSampleLayer(Layer):
        """A layer once it is cast: as TensorRT up to 11.1 reads the mode `linear`."""

        interpolation_mode = SimpleNamespace(name="NEAREST")
        sample_mode = SimpleNamespace(name="FILL")
        align_corners = False

    class Config:
        num_compute_capabilities = 0

        def __init__(self) -> None:
            self.profiles: list[dict[str, Any]] = []
            self.capabilities: list[str] = []
            script.seen["config"] = self

        def set_compute_capability(self, capability: str, index: int) -> None:
            self.capabilities.append(capability)

        def clear_flag(self, flag: str) -> None:
            script.seen["cleared"] = flag

        def set_flag(self, flag: str) -> None:
            script.seen["flag"] = flag

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile.shapes)
            return len(self.profiles) - 1

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, *ends: Any) -> None:
            self.shapes[name] = ends

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Any:
            script.seen["flags"] = flags
            layers = [Layer(type=SimpleNamespace(name=name)) for name in script.layers]
            kind = SimpleNamespace(name="HALF")
            return SimpleNamespace(
                num_layers=len(layers),
                get_layer=layers.__getitem__,
                num_inputs=1,
                get_input=lambda index: SimpleNamespace(name="x", dtype=kind),
                num_outputs=1,
                get_output=lambda index: SimpleNamespace(name="y", dtype=kind),
            )

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network_to_stream(
            self, network: Any, config: Any, writer: Any
        ) -> bool:
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, script.steps)
            going = all(monitor.step_complete("Building", step) for step in range(script.steps))
            monitor.phase_finish("Building")
            for line in script.build_errors:
                self.logger.log(SimpleNamespace(name="ERROR"), line)
            if script.build_errors or not going:
                return False
            return all(writer.write(piece) == len(piece) for piece in script.pieces)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, engine: bytes) -> Any:
            script.seen["inspected"] = engine
            if script.inspected is None:
                return None
            inspector = SimpleNamespace(get_engine_information=lambda form: script.inspected)
            return SimpleNamespace(create_engine_inspector=lambda: inspector)

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self.logger = logger
            self.num_errors = len(script.parse_errors)

        def parse_from_file(self, path: str) -> bool:
            script.seen["parsed"] = path
            for severity, line in script.parse_lines:
                self.logger.log(SimpleNamespace(name=severity), line)
            return not script.parse_errors

        def get_error(self, index: int) -> Any:
            node, operator, text = script.parse_errors[index]
            return SimpleNamespace(
                node_name=_gives(node), node_operator=_gives(operator), desc=_gives(text)
            )

    return SimpleNamespace(
        __name__="tensorrt_rtx",
        __version__=version,
        ILogger=Base,
        IProgressMonitor=Base,
        IStreamWriter=Base,
        Builder=Builder,
        Runtime=Runtime,
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="DETAILED"),
        OnnxParser=OnnxParser,
        IGridSampleLayer=GridSampleLayer,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        BuilderFlag=SimpleNamespace(TF32="TF32", REQUIRE_USER_ALLOCATION="REQUIRE_USER_ALLOCATION"),
        ComputeCapability=SimpleNamespace(SM80="80", SM86="86", SM89="89", SM120="120"),
    )


def _gives(value: str) -> Callable[[], str]:
    return lambda: value


class FakePlugin:
    """Result of `Plugin.load`."""

    def __init__(self, report: str = "") -> None:
        self.report, self.registered = report, True

    def last_report(self) -> str:
        return self.report

    def unregister(self) -> None:
        self.registered = False
