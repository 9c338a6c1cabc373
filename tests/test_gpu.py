"""What runs by other kernels on a GPU, against what runs anywhere. Skipped without one."""

import pytest
import torch

from helpers import EOS, make_rollout, tiny_model
from stable_opd import InProcessEngine, ReverseKL, Temperature, TransformersEngine
from stable_opd.engines import Request
from stable_opd.models import Head
from stable_opd.packing import Packing, attend_packed
from stable_opd.scoring import HiddenStates, body
from stable_opd.streaming import Part, streamed_loss
from streams import draw_evidence, draw_states

pytestmark = pytest.mark.gpu
ROWS = [[1, 2, 3], [4] * 30, [5], [6, 7, 8, 9] * 4]
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [3, 4]]


@pytest.mark.parametrize("window", [None, 7])
def test_variable_length_attention_equals_padded_attention(window):
    lengths = torch.tensor([5, 40, 1, 17], device="cuda")
    q, k, v = (torch.randn(63, heads, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    found = attend_packed(q, k, v, Packing(lengths), sliding_window=window)
    expected = attend_packed(q.float(), k.float(), v.float(), Packing(lengths), sliding_window=window)
    assert (found.float() - expected).abs().max() < 0.03


def test_packed_body_in_bfloat16_is_near_float32_and_so_are_its_gradients():
    rollout = make_rollout(ROWS, PROMPTS)
    moved = {name: getattr(rollout, name).cuda() for name in ("tokens", "prompt_lengths", "lengths")}
    rollout = type(rollout)(**{**vars(rollout), **moved})
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(1, hidden_size=64, head_dim=32).cuda().to(dtype)
        hidden = body(model, rollout)
        hidden.float().mul(torch.linspace(-1, 1, hidden.numel(), device="cuda").view_as(hidden)).sum().backward()
        found[dtype] = hidden.float(), model.base_model.layers[0].self_attn.q_proj.weight.grad.float()
    for exact, low in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        assert (exact - low).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_loss_equals_that_of_a_cpu(dtype):
    evidence, shares = draw_evidence()
    results = {}
    for device in ("cpu", "cuda"):
        ours, theirs = (
            HiddenStates(each.states.to(device, dtype), Head(each.head.weight.to(device, dtype)))
            for each in (draw_states(0), draw_states(1))
        )
        student = HiddenStates(ours.states.requires_grad_(), Head(ours.head.weight.requires_grad_()))
        seen = type(evidence)(
            *(getattr(evidence, name).to(device) for name in ("tokens", "row", "position", "in_loop", "author")),
            evidence.behaviour_logprobs.to(device),
            evidence.progress,
        )
        loss = streamed_loss(student, [Part({"kl": ReverseKL()}, seen, {"kl": shares.to(device)}, theirs)]).loss
        loss.backward()
        results[device] = [each.cpu().float() for each in (loss, student.states.grad, student.head.weight.grad)]
    for cpu, gpu in zip(results["cpu"], results["cuda"], strict=True):
        assert (cpu - gpu).norm() < (1e-4 if dtype == torch.float32 else 0.02) * cpu.norm()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_steps_write_what_the_models_own_forward_writes(temperature):
    model = tiny_model(1, max_position_embeddings=700).cuda()
    request = Request(PROMPTS, [0, 1, 2, 3, 2, 1], [1, 2, 3, 4, 5, 6], 600, [EOS])
    fast = InProcessEngine().generate(model, request, Temperature(temperature))
    slow = TransformersEngine().generate(model, request, Temperature(temperature))
    assert fast.lengths.tolist() == slow.lengths.tolist()
    assert fast.tokens.tolist() == slow.tokens.tolist()
    assert (fast.logprobs - slow.logprobs).abs().max() < 1e-3
