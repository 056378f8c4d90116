import pytest
import torch

from titan_quant.config import LoRAConfig
from titan_quant.lora import add_lora, merge_lora
from titan_quant.peft import ExportError, export_peft


@pytest.fixture(scope="module")
def llama():
    """A tiny real model of `transformers`, as a function that builds the same one again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )

    def build():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    return build


@pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's next versions
def test_adapters_are_loaded_by_peft_and_compute_the_same(llama, tmp_path):
    from peft import PeftModel

    config = LoRAConfig(rank=4, alpha=6.0, exclude=("*.down_proj",))
    model = llama()
    adapters = add_lora(model, config)
    assert len(adapters.layers) == 12
    for name in adapters.parameters:
        model.get_parameter(name).data.normal_(std=0.1)
    # A model with names of its own: they become those of the base model.
    own = {name.replace("model.layers", "blocks"): tensor for name, tensor in model.state_dict().items()}
    export_peft(
        tmp_path / "adapter",
        own,
        config,
        base_model="tiny",
        rename=lambda name: name.replace("blocks", "model.layers"),
    )
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    tokens = torch.randint(64, (2, 9))
    expected = model(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, expected)
    assert not torch.allclose(llama()(tokens).logits, expected, atol=1e-3)
    merged = llama()
    merged.load_state_dict(merge_lora(model.state_dict(), config))
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_without_adapters_there_is_nothing_to_export(llama, tmp_path):
    with pytest.raises(ExportError, match="no adapter"):
        export_peft(tmp_path / "adapter", llama().state_dict(), LoRAConfig(rank=4), base_model="tiny")
    assert not (tmp_path / "adapter").exists()
