"""`coral-hf serve`: Transformers' OpenAI-compatible server with a drafter attached to the target."""

from dataclasses import dataclass, field

from .loading import DEMO, DrafterOptions, PlacedTargetOptions, load_drafter, require


@dataclass
class ServeCommand(PlacedTargetOptions, DrafterOptions):
    """Serve a target with its drafter to OpenAI clients, using Transformers' server.

    Requests are answered one at a time, with draft trees. The answers are the same as without the drafter. The API is that of
    `transformers serve`. Requests name the model as --target does.

    Examples:
        coral-hf serve --target your/model --drafter outputs/drafter
        coral-hf serve --target your/model --drafter org/drafter --host 0.0.0.0 --port 8080
        coral-hf serve --target demo --drafter demo --dtype float32 --port 8000
    """

    drafter: str = field(default=DEMO, metadata={"help": "Path or Hub id of the drafter, or 'demo'."})
    dtype: str = field(default="auto", metadata={"help": "auto, bfloat16, float16 or float32."})
    host: str = field(default="localhost", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    continuous_batching: bool = field(
        default=False, metadata={"help": "Not supported: continuous batching does not call generate."}
    )

    def run(self) -> int:
        from ..generation.attachment import attach
        from ..utils.compat import openai_server

        if self.continuous_batching:
            raise ValueError(
                "--continuous_batching true does not call generate, so nothing would be drafted. Leave it out, or serve many "
                "requests at once with an engine (`coral-hf convert --to vllm` or `--to sglang`)."
            )
        if not 0 < self.port < 2**16:
            raise ValueError(f"--port {self.port} must be between 1 and 65535.")
        require("fastapi", "uvicorn", "openai", extra="serve")
        drafter = load_drafter(self.drafter, self.drafter_revision)
        target, tokenizer = self.load_target(self.dtype)
        attach(target, drafter.to(device=target.device, dtype=target.dtype))
        serve = openai_server(target, tokenizer, self.target)
        print(f"Serving {self.target} with {self.drafter} on http://{self.host}:{self.port}/v1")
        serve(host=self.host, port=self.port)
        return 0


__all__ = ["ServeCommand"]
