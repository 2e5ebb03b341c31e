"""DSPy against running servers: prediction, chain of thought, JSON adapter, an agent with a tool, vectors.

    pip install dspy && python dspy_loop.py URL MODEL ENCODER_URL ENCODER

Ends with an error when anything is not as it should be.
"""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched from elsewhere

import dspy


class Extract(dspy.Signature):
    """Extract the person of whom the text tells."""

    text: str = dspy.InputField()
    name: str = dspy.OutputField()
    age: int = dspy.OutputField()


def main(url: str, model: str, encoder_url: str, encoder: str) -> None:
    """All runs."""
    common = {"api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 200, "cache": False}
    lm = dspy.LM(f"openai/{model}", **common)
    said = lm("What is the capital of France?")[0]
    assert "Paris" in (said if isinstance(said, str) else said["text"])
    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter()):
        with dspy.context(lm=lm, adapter=adapter):
            told = dspy.Predict(Extract)(text="Ann is 31 years old and lives in Paris.")
            assert (told.name, told.age) == ("Ann", 31), told
    completing = dspy.LM(f"text-completion-openai/{model}", model_type="text", **common)
    assert completing("The capital of France is")
    vectors = dspy.Embedder(f"openai/{encoder}", api_base=f"{encoder_url}/v1", api_key="none", caching=False)
    assert vectors(["Paris", "Bread"]).shape == (2, 384)
    print(f"dspy {dspy.__version__}: answers, two adapters, completions, vectors")


main(*sys.argv[1:])
