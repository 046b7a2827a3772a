"""The accounts: formulas against torch's own FLOP counter, and who pays for what."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpgbench.api import Options
from dpgbench.bench.flops import counted_flops, forward_flops, sampling_flops, shape_of
from dpgbench.bench.meter import Meter
from dpgbench.metagrad.loss import padding_computed
from dpgbench.worlds.adapters import adapt

EAGER = {"n_positions": 64, "attn_implementation": "eager"}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=311, n_embd=32, n_layer=3, n_head=4, **EAGER)),
    "gpt2_wide": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=96, n_layer=2, n_head=2, **EAGER)),
    "llama_grouped": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=211, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
                    num_key_value_heads=2, max_position_embeddings=64, attn_implementation="eager")
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


def counted(function) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_forward_matches_the_counter(model):
    """F(B, L) within 2%, at two shapes."""
    for batch, length in ((4, 16), (3, 40)):
        ids = torch.zeros(batch, length, dtype=torch.long)
        with torch.no_grad():
            assert forward_flops(model, batch, length) == pytest.approx(counted(lambda ids=ids: model(ids)), rel=0.02)


def test_training_is_three_forwards(model):
    """Forward and backward within 5% of 3F."""
    ids = torch.zeros(4, 24, dtype=torch.long)
    assert 3 * forward_flops(model, 4, 24) == pytest.approx(counted(lambda: model(ids, labels=ids).loss.backward()), rel=0.05)


@pytest.mark.parametrize("targets", [["all-linear"], ["c_attn", "q_proj", "v_proj"], ["mlp.c_proj", "down_proj"]], ids=" ".join)
def test_training_adapters_is_little_more_than_two_forwards(model, targets):
    """`Shape.training_flops` against the counter within 5%, whatever has an adapter; less than 3F, which full training of it would be."""
    adapted = adapt(model, Options({"rank": 4, "alpha": 8.0, "targets": targets}), seed=0)
    ids = torch.zeros(4, 24, dtype=torch.long)
    shape = shape_of(adapted, trains=True)
    assert shape.training_flops(4, 24) == pytest.approx(counted(lambda: adapted(input_ids=ids, labels=ids).loss.backward()), rel=0.05)
    assert shape.training_flops(4, 24) < 0.9 * 3 * shape.forward_flops(4, 24)
    assert not any(weight.grad is not None for weight in model.parameters() if not weight.requires_grad)


def test_sampling_matches_the_counter(model):
    """Prompt once, then a token at a time with the cache, within 5%."""
    ids = torch.ones(3, 12, dtype=torch.long)
    settings = dict(do_sample=False, min_new_tokens=20, max_new_tokens=20, pad_token_id=0, attention_mask=torch.ones_like(ids))
    assert sampling_flops(model, 3, 12, 20) == pytest.approx(counted(lambda: model.generate(ids, **settings)), rel=0.05)
    assert sampling_flops(model, 3, 12, 0) == 0


def test_metagradients_are_charged_what_they_cost_and_counting_changes_nothing():
    """The bench's charge for a call is the counter's total, and rewards under the counter are the same bits as of padded batches."""
    from dpgbench.metagrad import metagradients
    from dpgbench.metagrad.training import AdamW

    model = MODELS["gpt2"]().eval()
    ids = torch.randint(0, 311, (16, 24), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "labels": part} for part in ids.chunk(2)]

    def rewards():
        return metagradients(model, batches, lambda m: -m(ids).logits.square().mean(), optimizer=AdamW(lr=1e-3, eps_root=1e-6)).rewards

    plain = rewards()
    under_counter, flops = counted_flops(rewards)
    with padding_computed():
        assert torch.equal(rewards(), under_counter)
    assert torch.allclose(plain, under_counter, rtol=1e-4, atol=1e-8)
    assert flops > 3 * forward_flops(model, 16, 24)


SIGNALS = {"head": lambda m: -m.get_output_embeddings().weight.square().sum(), "loss": lambda m: -m(PROBE, labels=PROBE).loss}
PROBE = torch.arange(40).view(4, 10)
WAYS = {
    "tapes": {},
    "no tape": {"memory_budget": 1},
    "some tapes": {"memory_budget": 29_000_000},
    "replayed": {"checkpoint": 2},
    "micro-batches": {"micro_batch": 3},
    "reverse": {"mode": "reverse"},
    "tokens": {"per_token": True},
}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("way", WAYS)
def test_one_of_each_kind_is_enough_to_count(monkeypatch, way, signal):
    """FLOPs of six steps, two of them of another length, however they are differentiated: those of torch's counter over all of it."""
    from dpgbench.bench.flops import _Counter
    from dpgbench.metagrad import metagradients
    from dpgbench.metagrad.training import AdamW

    model = MODELS["gpt2_wide"]().eval()
    ids = torch.randint(0, 90, (24, 20), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "labels": part} for part in (*ids[:16].chunk(4), *ids[16:, :12].chunk(2))]
    modes, computed = [], []

    def rewards():
        outcome = metagradients(model, batches, SIGNALS[signal], optimizer=AdamW(lr=1e-3, eps_root=1e-6), **WAYS[way])
        modes.append(outcome.modes)
        return outcome.rewards

    rewards()  # what is checked once a model is behind us
    under_counter, flops = counted_flops(rewards)
    record = _Counter.__enter__
    monkeypatch.setattr(_Counter, "__enter__", lambda counter: computed.append(1) or record(counter))
    assert counted_flops(rewards)[1] == flops and len(computed) > 6  # it was stopped and started again
    monkeypatch.setattr(_Counter, "alike", lambda counter, kind, work: work())
    every_piece, all_flops = counted_flops(rewards)
    assert flops == all_flops and torch.equal(under_counter, every_piece) and len(set(modes)) == 1
    if way == "some tapes":
        assert {"tape", "forward"} == set(modes[0])


def test_what_raises_is_no_measure_of_its_kind():
    """Work that was given up counts as far as it went; the next of its kind is counted whole."""
    from dpgbench.metagrad.alike import alike

    def product(times, fails=False):
        for _ in range(times):
            torch.ones(2, 3) @ torch.ones(3, 4)
        if fails:
            raise KeyError

    def work():
        with pytest.raises(KeyError):
            alike("a", lambda: product(1, fails=True))
        for times in (3, 5):  # the second is taken for the first
            alike("a", lambda times=times: product(times))
        alike("b", lambda: alike("a", lambda: product(7)))
        alike("b", lambda: product(9))

    assert counted_flops(work)[1] == 48 * (1 + 3 + 3 + 3 + 3)
    assert counted_flops(lambda: alike("a", lambda: product(2)))[1] == 48 * 2  # known in one call and not in the next


@pytest.mark.parametrize("name", ["gpt2_wide", "llama_grouped"])
@pytest.mark.parametrize("steps", [1, 3])
def test_metagradients_lie_within_what_the_bench_documents(name, steps):
    """Workbench.metagradients: T steps of training, 3TF, and from 0.3F (a metric of the head alone, T=1) to 2F + 9(T-1)F for the way back.

    Here the metric also has a forward pass of its own on one batch, and a backward: another 3F at most.
    """
    from dpgbench.metagrad import metagradients
    from dpgbench.metagrad.training import AdamW

    model = MODELS[name]().eval()
    ids = torch.randint(0, 90, (8 * steps, 24), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "labels": part} for part in ids.chunk(steps)]
    optimizer = AdamW(lr=1e-3, eps_root=1e-6)

    def flops(signal):
        return counted_flops(lambda: metagradients(model, batches, signal, optimizer=optimizer))[1]

    forward = forward_flops(model, 8, 24)
    head_only = flops(lambda m: -m.get_output_embeddings().weight.square().sum())
    assert 0.95 * 3.3 * forward <= head_only <= 1.05 * (3 * steps + 2 + 9 * (steps - 1)) * forward
    held_out = flops(lambda m: -m(ids[:8], labels=ids[:8]).loss)
    assert head_only < held_out <= 1.05 * (3 * steps + 2 + 9 * (steps - 1) + 3) * forward


@pytest.mark.parametrize(
    "lora", [[], ["policy.lora.rank=8"], ["policy.lora.rank=8", "policy.lora.targets=[c_proj]"]], ids=["full", "all", "c_proj"]
)
@pytest.mark.parametrize("shape", [{}, {"n_embd": 96, "n_layer": 3, "n_head": 2}], ids=["tiny", "wide"])
def test_a_policy_update_is_charged_what_trl_computes(bench, monkeypatch, shape, lora):
    """TRL's loss and its backward, from compute_loss to the end of accelerator.backward, against the meter's "policy_update".

    The layers within 5%. The head is charged where there is something to predict, its product and the gradients of its input and, if it
    trains, its weights. TRL computes those in tiles, forward's once more in backward so that no logits are kept, and off a GPU at every
    position: memory and shapes bought with time, which are nobody's cost here, as with checkpointed activations. Padding and each
    completion's prompt are charged, and so computed where FLOPs are counted (`padding_computed`).
    """
    from trl import GRPOTrainer

    from dpgbench.bench.grpo import train_policy

    work = bench("steps=1", *lora)
    if shape:
        kept = work.generator.model.config.to_dict() | shape | {"n_inner": None, "attn_implementation": "eager"}  # fused is not counted
        work.generator.model = GPT2LMHeadModel(GPT2Config(**kept)).eval()
    counted_updates = []
    compute_loss = GRPOTrainer.compute_loss
    add_in_place = {torch.ops.aten.addmm_: lambda total, left, right, *_, **__: 2 * left[0] * left[1] * right[1]}

    def counting(trainer, *args, **kwargs):
        padded = padding_computed()
        padded.__enter__()
        counter = FlopCounterMode(display=False, custom_mapping=add_in_place).__enter__()
        backward = trainer.accelerator.backward

        def to_the_end(*inner, **more):
            backward(*inner, **more)
            counter.__exit__(None, None, None)
            padded.__exit__(None, None, None)
            trainer.accelerator.backward = backward
            counted_updates.append(counter.get_total_flops())

        trainer.accelerator.backward = to_the_end
        return compute_loss(trainer, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "compute_loss", counting)
    shapes = []  # (completions, prompts' length, new tokens)
    monkeypatch.setattr(work, "charge_generation", lambda *shape, **more: shapes.append(shape))
    for _ in train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions]):
        pass
    (count,), ((_, prompt, new),), charged = counted_updates, shapes, work.meter.flops["policy_update"]
    position = 2 * work.generator.model.get_output_embeddings().weight.numel() * 16  # one product of the head, for all completions
    products = 2 if lora else 3
    assert charged - products * position * (new + 1) == pytest.approx(count - (products + 1) * position * (prompt + new - 1), rel=0.05)


def test_counted_flops_counts_user_code():
    """A 2x3 by 3x4 product is 2*2*3*4 = 48."""
    assert counted_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 4))[1] == 48


def test_products_that_add_in_place_are_counted():
    """The engine's forward mode accumulates products in place; torch's counter alone sees none of them."""
    x, w, stack = torch.ones(5, 3), torch.ones(3, 7), torch.ones(2, 5, 3)
    assert counted_flops(lambda: torch.zeros(5, 7).addmm_(x, w))[1] == counted_flops(lambda: x @ w)[1] == 2 * 5 * 3 * 7
    assert counted_flops(lambda: torch.zeros(2, 5, 5).baddbmm_(stack, stack.mT))[1] == 2 * 2 * 5 * 3 * 5


def test_a_deployment_dataset_is_paid_once():
    """Datasets drawn at earlier snapshots are not part of a later snapshot's price."""
    meter = Meter()
    meter.charge("generate", 100, generated=10)
    for _ in range(2):
        with meter.deployment() as price:
            meter.charge("generate", 7, generated=1)
            meter.charge("scoring", 3)
    total = meter + price
    assert total.total_flops == 110 and total.flops["deployment"] == 10 and total.tokens_generated == 11
    with pytest.raises(ValueError, match="phase='sleep'"):
        meter.charge("sleep", 1)


def test_what_a_backward_pass_keeps_is_roughly_counted(model):
    """`Shape.activations`, values that autograd saves outside of parameters, within a factor of 1.6; the logits are counted elsewhere."""
    from dpgbench.run.estimate import shape_of

    ids, saved = torch.zeros(4, 48, dtype=torch.long), {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters and tensor.is_floating_point():
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes() / tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(ids).last_hidden_state.sum()
    shape = shape_of(model.config.to_dict())
    assert shape.activations(4, 48) / 1.6 < sum(saved.values()) < 1.6 * shape.activations(4, 48)
    assert shape.activations(4, 48, checkpointed=True) < shape.activations(4, 48)
