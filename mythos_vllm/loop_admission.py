"""Loops per request where vLLM takes requests in: the worker that obeys them, the check of each request before it is
answered, and the prefix cache's salt."""

import functools
import json
import sys
from importlib.metadata import entry_points
from typing import Any

from .request_loops import LoopServer, check_request, experimental_option, obstacles, requested_loops, salted

ARCHITECTURE = "MythosForCausalLM"
WORKER = "mythos_vllm.loop_worker.LoopWorker"


def loop_server(vllm_config: Any) -> LoopServer | None:
    """Describe the server of a configuration; None where it serves another model."""
    from vllm.config import CompilationMode, CUDAGraphMode

    model, parallel, compiled = vllm_config.model_config, vllm_config.parallel_config, vllm_config.compilation_config
    if model is None or ARCHITECTURE not in (model.hf_config.architectures or []):
        return None
    second = vllm_config.use_v2_model_runner
    found = obstacles(
        second_runner=second,
        experimental=experimental_option(vllm_config.additional_config, second),
        own_worker=parallel.worker_cls == WORKER,
        worker=str(parallel.worker_cls),
        graphs=compiled.cudagraph_mode != CUDAGraphMode.NONE or compiled.mode == CompilationMode.STOCK_TORCH_COMPILE,
        data_parallel=parallel.data_parallel_size,
        microbatches=parallel.use_ubatching,
        speculative=vllm_config.speculative_config is not None,
        connector=vllm_config.kv_transfer_config is not None,
    )
    return LoopServer(model.hf_config.n_loops, found, bool(model.logits_processors) or _installed_processors())


@functools.cache
def _installed_processors() -> bool:
    """Whether packages of this environment bring logits processors."""
    return bool(entry_points(group="vllm.logits_processors"))


def admit() -> None:
    """Make vLLM check and salt every request to a looped model, offline and over HTTP, and choose its worker."""
    from vllm.exceptions import VLLMValidationError
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.v1.engine.input_processor import InputProcessor

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return

    class LoopConfig(VerifyAndUpdateConfig):
        """What vLLM calls for each server of the architecture, before it chooses a worker."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            _choose_worker(vllm_config)
            _guard_http()

    MODELS_CONFIG_MAP[ARCHITECTURE] = LoopConfig
    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        server = loop_server(self.vllm_config)
        if server is None:
            return process(self, request_id, prompt, params, *args, **kwargs)
        try:
            loops = requested_loops(getattr(params, "extra_args", None), server)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        request = process(self, request_id, prompt, params, *args, **kwargs)
        if not server.obstacles:
            request.cache_salt = salted(request.cache_salt, loops)
        return request

    InputProcessor.process_inputs = process_inputs


class LoopGuard:
    """ASGI middleware that answers 400 to a request whose loops the server cannot run, before vLLM reads it.

    vLLM alone would drop `n_loops` beside vllm_xargs, read true as 1, and find other mistakes in a stream only after it
    has answered 200.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on what is in order."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages, more = [], True
        while more:
            messages.append(await receive())
            more = messages[-1].get("more_body", False)
        fault = self._fault(scope, b"".join(message.get("body", b"") for message in messages))
        if fault is not None:
            from starlette.responses import JSONResponse

            error = {"message": fault, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
            await JSONResponse({"error": error}, 400)(scope, receive, send)
            return

        async def again() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)

    def _fault(self, scope: Any, body: bytes) -> str | None:
        if b"n_loops" not in body and b"vllm_xargs" not in body:
            return None
        client = getattr(scope["app"].state, "engine_client", None)
        server = None if client is None else loop_server(client.vllm_config)
        try:
            sent = json.loads(body)
        except ValueError:
            return None  # vLLM says what is wrong with it
        if server is None:
            return None  # a server that only renders prompts
        try:
            check_request(scope["path"], sent, server)
        except ValueError as error:
            return str(error)
        return None


def _choose_worker(vllm_config: Any) -> None:
    """The plugin's worker, where the first model runner works and the user named no other."""
    from vllm.platforms import current_platform

    second = vllm_config.use_v2_model_runner
    experimental_option(vllm_config.additional_config, second)  # a mistake ends the start
    known = current_platform.is_cpu() or current_platform.is_cuda_alike()
    if known and not second and vllm_config.parallel_config.worker_cls == "auto":
        vllm_config.parallel_config.worker_cls = WORKER


def _guard_http() -> None:
    """Put LoopGuard behind the other middleware of the server that this process is about to build, if any."""
    launcher: Any = sys.modules.get("vllm.entrypoints.launchers.app")
    if launcher is None or hasattr(launcher.init_entrypoints_middleware, "__wrapped__"):
        return
    build = launcher.init_entrypoints_middleware

    @functools.wraps(build)
    def guarded(args: Any, app: Any, *rest: Any) -> None:
        app.add_middleware(LoopGuard)
        build(args, app, *rest)

    launcher.init_entrypoints_middleware = guarded
