"""Objectives: known values, draws that do not depend on processes, and exact gradients on two processes."""

import math

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import PairmillError
from training.batch import Batch
from training.config_models import CLIPConfig, ViLTConfig
from training.models.clip import CLIP
from training.models.vilt import ViLT
from training.objectives import Together, global_mean
from training.objectives.alignment import WordPatchAlignment, alignment_masks, cosine_cost, ipot, transport_distance
from training.objectives.contrastive import Contrastive
from training.objectives.masked_language import MaskedLanguage
from training.objectives.matching import Matching, Ranking, draw_negatives, match_labels
from training.outputs import Outputs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def every_second_token(input_ids, seeds):
    """A masker whose choice is a function of the row's seed alone: token ids become 1."""
    shift = torch.tensor(seeds)[:, None] % 2
    chosen = (torch.arange(input_ids.shape[1])[None] + shift) % 2 == 0
    return torch.where(chosen, 1, input_ids), torch.where(chosen, input_ids, -100)


# contrastive


def unit(B, E=6):
    return F.normalize(torch.randn(B, E), dim=-1)


def test_scale_zero_gives_ln_n():
    loss, _, _ = Contrastive().pair_loss(unit(7), unit(7), torch.tensor(0.0))
    assert loss.item() == pytest.approx(math.log(7))


def test_contrastive_worked_by_hand():
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    outputs = Outputs(image_features=images, text_features=texts, logit_scale=torch.tensor(math.log(2.0)))
    loss, metrics = Contrastive().loss(outputs, Batch())
    per_image = -math.log(math.exp(2) / (math.exp(2) + math.exp(1.2))) - math.log(math.exp(1.6) / (1 + math.exp(1.6)))
    per_text = -math.log(math.exp(2) / (math.exp(2) + 1)) - math.log(math.exp(1.6) / (math.exp(1.2) + math.exp(1.6)))
    assert loss.item() == pytest.approx((per_image + per_text) / 4)
    assert metrics["contrastive_accuracy"] == 1
    assert metrics["logit_scale"].item() == pytest.approx(2.0)


# masked language


def test_masked_language_counts_only_labelled_tokens():
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, -100, 4], [-100, -100, 0]])
    loss, metrics = MaskedLanguage(every_second_token).loss(Outputs(token_logits=logits), Batch(labels=labels))
    asked = labels != -100
    want = -logits.log_softmax(-1)[asked].gather(1, labels[asked][:, None]).mean()
    torch.testing.assert_close(loss, want)
    assert metrics["mlm_accuracy"] == (logits.argmax(-1) == labels)[asked].float().mean()


def test_nothing_to_predict_gives_zero_not_nan():
    logits = torch.randn(1, 2, 5, requires_grad=True)
    loss, _ = MaskedLanguage(every_second_token).loss(
        Outputs(token_logits=logits), Batch(labels=torch.full((1, 2), -100))
    )
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_masks_do_not_depend_on_the_number_of_processes():
    ids = torch.randint(2, 99, (8, 6))
    objective = MaskedLanguage(every_second_token)
    whole = objective.prepare(Batch(input_ids=ids), generator())
    for start in (0, 4):
        part = Batch(input_ids=ids[start : start + 4], start=start, total=8)
        prepared = objective.prepare(part, generator())
        assert torch.equal(prepared.input_ids, whole.input_ids[start : start + 4])
        assert torch.equal(prepared.labels, whole.labels[start : start + 4])
    assert not torch.equal(whole.labels, objective.prepare(Batch(input_ids=ids), generator(4)).labels)
    assert torch.equal(torch.where(whole.labels != -100, whole.labels, whole.input_ids), ids)


# matching


@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_exactly_half_are_positive_over_all_processes(local, processes, seed):
    total = local * processes
    labels = []
    for rank in range(processes):
        batch = Batch(input_ids=torch.zeros(local, 1), start=rank * local, total=total)
        labels.append(match_labels(batch.draw_order(generator(seed)), total))
    assert torch.cat(labels).sum() == total // 2


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_negatives_are_never_the_pair_itself(B, block, seed):
    rows = torch.randint(3, (B, 2), generator=generator(seed))
    rows[1] = rows[0] + 1
    batch = Batch(input_ids=torch.zeros(B, 1), rows=rows)
    others = draw_negatives(batch, generator(seed), block)
    assert not (rows[others] == rows).all(1).any()


def test_negatives_stay_in_their_block_and_vary():
    batch = Batch(input_ids=torch.zeros(12, 1))
    drawn = torch.stack([draw_negatives(batch, generator(s), block=4) for s in range(60)])
    place = torch.arange(12)
    assert (drawn // 4 == place // 4).all()
    assert not (drawn == place).any()
    assert all(len(column.unique()) == 3 for column in drawn.T)


def test_quirk_may_draw_the_pair_itself():
    batch = Batch(input_ids=torch.zeros(8, 1))
    drawn = torch.stack([draw_negatives(batch, generator(s), block=4, allow_self=True) for s in range(60)])
    share = (drawn == torch.arange(8)).float().mean()
    assert share.item() == pytest.approx(1 / 4, abs=0.06)


def test_no_other_image_is_an_error():
    with pytest.raises(PairmillError, match="at least 2 different images"):
        draw_negatives(Batch(input_ids=torch.zeros(3, 1), rows=torch.ones(3, 2)), generator())


def test_prepared_pairs_match_their_labels():
    B = 6
    batch = Batch(
        input_ids=torch.arange(B)[:, None],
        rows=torch.stack([torch.zeros(B), torch.arange(B)], 1).long(),
        pixel_values=torch.arange(B).view(B, 1, 1, 1).expand(B, 3, 4, 4),
        image_sizes=torch.arange(B)[:, None].expand(B, 2),
    )
    prepared = Matching().prepare(batch, generator())
    shown = prepared.pixel_values[:, 0, 0, 0]
    assert torch.equal((shown == torch.arange(B)).long(), prepared.match_labels)
    assert torch.equal(prepared.image_sizes[:, 0], shown)
    assert prepared.match_labels.sum() == B // 2
    assert torch.equal(prepared.input_ids, batch.input_ids)


def test_matching_pairs_do_not_depend_on_the_number_of_processes():
    B = 8
    fields = {"input_ids": torch.arange(B)[:, None], "patches": torch.arange(B)[:, None, None]}
    whole = Matching().prepare(Batch(**fields), generator())
    for start in (0, 4):
        part = Batch(**{n: t[start : start + 4] for n, t in fields.items()}, start=start, total=B)
        prepared = Matching().prepare(part, generator())
        assert torch.equal(prepared.patches, whole.patches[start : start + 4])
        assert torch.equal(prepared.match_labels, whole.match_labels[start : start + 4])


def test_matching_loss_is_cross_entropy():
    logits, labels = torch.randn(4, 2), torch.tensor([1, 0, 1, 0])
    loss, metrics = Matching().loss(Outputs(match_logits=logits), Batch(match_labels=labels))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert metrics["itm_accuracy"] == (logits.argmax(1) == labels).float().mean()


def test_ranking_puts_the_true_text_first():
    batch = Batch(
        input_ids=torch.tensor([[1], [2]]),
        text_mask=torch.ones(2, 1, dtype=torch.bool),
        false_ids=torch.tensor([[[3], [4]], [[5], [6]]]),
        false_mask=torch.ones(2, 2, 1, dtype=torch.bool),
        pixel_values=torch.arange(2).view(2, 1, 1, 1),
    )
    prepared = Ranking().prepare(batch, generator())
    assert prepared.input_ids.flatten().tolist() == [1, 3, 4, 2, 5, 6]
    assert prepared.pixel_values.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    loss, metrics = Ranking().loss(Outputs(rank_scores=torch.tensor([2.0, 0, 0, 0, 3, 0])), prepared)
    want = (-math.log(math.exp(2) / (math.exp(2) + 2)) - math.log(1 / (2 + math.exp(3)))) / 2
    assert loss.item() == pytest.approx(want)
    assert metrics["ranking_accuracy"] == 0.5


# alignment


def masks(words, patches, T=7, N=9):
    words, patches = torch.tensor(words), torch.tensor(patches)
    return torch.arange(T)[None] < words[:, None], torch.arange(N)[None] < patches[:, None]


def test_masks_leave_out_first_last_and_class_token():
    words, patches = alignment_masks(*masks([7, 4], [9, 3]))
    assert words.int().tolist() == [[0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0]]
    assert patches.int().tolist() == [[0, *[1] * 8], [0, 1, 1, *[0] * 6]]


def test_transport_plan_has_the_right_margins():
    words, patches = masks([5, 7], [9, 4])
    cost = cosine_cost(torch.randn(2, 7, 8), torch.randn(2, 9, 8), words, patches)
    plan = ipot(cost, words, patches)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan.sum(1), words / words.sum(1, keepdim=True), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(2), patches / patches.sum(1, keepdim=True), atol=2e-2, rtol=0)
    assert not plan[~(patches[:, :, None] & words[:, None])].any()


def test_identical_embeddings_cost_nothing_and_others_something():
    words, patches = masks([6], [6], 6, 6)
    same, other = torch.eye(6)[None], -torch.eye(6)[None]
    for image, want in ((same, 0.0), (other, 1.0)):
        cost = cosine_cost(same, image, words, patches)
        distance = transport_distance(cost, ipot(cost, words, patches))
        assert distance.item() == pytest.approx(want, abs=1e-3)


def test_a_text_without_words_costs_nothing():
    outputs = Outputs(
        text=torch.randn(1, 4, 8, requires_grad=True),
        text_mask=torch.tensor([[True, True, False, False]]),
        image=torch.randn(1, 5, 8),
        image_mask=torch.ones(1, 5, dtype=torch.bool),
    )
    loss, _ = WordPatchAlignment().loss(outputs, Batch())
    loss.backward()
    assert loss == 0
    assert torch.isfinite(outputs.text.grad).all()


def test_false_pairs_are_pushed_apart():
    text_mask, image_mask = masks([6, 6], [7, 7])
    outputs = Outputs(text=torch.randn(2, 7, 8), text_mask=text_mask, image=torch.randn(2, 9, 8), image_mask=image_mask)
    objective = WordPatchAlignment()
    distance, _, _ = objective.distances(outputs)
    both, _ = objective.loss(outputs, Batch())
    torch.testing.assert_close(both, distance.mean())
    half, _ = objective.loss(outputs, Batch(match_labels=torch.tensor([1, 0])))
    torch.testing.assert_close(half, (distance[0] - distance[1]) / 2)


# together


def test_together_shares_a_pass_and_sums():
    text_mask, image_mask = masks([6, 6], [7, 7])
    outputs = Outputs(
        text=torch.randn(2, 7, 8),
        text_mask=text_mask,
        image=torch.randn(2, 9, 8),
        image_mask=image_mask,
        match_logits=torch.randn(2, 2),
    )
    parts = Matching(), WordPatchAlignment()
    both = Together([(1.0, parts[0]), (0.1, parts[1])])
    batch = both.prepare(Batch(input_ids=torch.zeros(2, 7)), generator())
    assert batch.match_labels.sum() == 1
    loss, metrics = both.loss(outputs, batch)
    torch.testing.assert_close(loss, parts[0].loss(outputs, batch)[0] + 0.1 * parts[1].loss(outputs, batch)[0])
    assert {"itm_loss", "itm_accuracy", "alignment_loss"} == set(metrics)
    assert both.route == "matching"
    assert both.inputs == {"input_ids", "text_mask"}


def test_together_refuses_two_routes():
    with pytest.raises(PairmillError, match="cannot share the pass"):
        Together([(1.0, Matching()), (1.0, Contrastive())])


def test_batches_move_and_choose():
    batch = Batch(input_ids=torch.zeros(2, 1), boxes=torch.arange(2.0).view(2, 1, 1), rows=torch.zeros(2, 2))
    assert len(batch) == 2
    assert set(batch.images().tensors) == {"boxes"}
    assert batch.to("meta").device.type == "meta"
    assert batch.images(torch.tensor([1, 1])).boxes.flatten().tolist() == [1, 1]


# two processes

CLIP_TINY = CLIPConfig(
    embed=8,
    image_size=16,
    patch=8,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    context=6,
    vocab=30,
    text_width=16,
    text_layers=1,
    text_heads=2,
)
VILT_TINY = ViLTConfig(
    width=16, layers=1, heads=2, vocab=30, max_text_len=6, image_size=16, patch=8, max_image_len=3, dropout=0.0
)
B = 8
KINDS = ("clip", "vilt")


def global_batch():
    torch.manual_seed(1)
    ids = torch.randint(2, 30, (B, 6))
    mask = torch.arange(6)[None] < torch.randint(3, 7, (B, 1))
    pixels = torch.randint(256, (B, 3, 16, 16), dtype=torch.uint8)
    return Batch(input_ids=ids, text_mask=mask, pixel_values=pixels)


def step(kind, batch):
    """Loss and gradients of one step on this process's rows."""
    torch.manual_seed(0)
    if kind == "clip":
        model, objectives = CLIP(CLIP_TINY), [Contrastive()]
    else:
        model = ViLT(VILT_TINY)
        objectives = [
            MaskedLanguage(every_second_token),
            Together([(1.0, Matching()), (0.1, WordPatchAlignment())]),
        ]
    drawn = generator()
    batch = model.prepare(batch, drawn)
    total = torch.zeros(())
    for objective in objectives:
        prepared = objective.prepare(batch, drawn)
        total = total + objective.loss(model(prepared, route=objective.route), prepared)[0]
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def worker(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    whole, half = global_batch(), slice(rank * B // 2, (rank + 1) * B // 2)
    own = Batch(**{n: t[half] for n, t in whole.tensors.items()}, start=half.start, total=B)
    for kind in KINDS:
        loss, grads = step(kind, own)
        for tensor in (loss, *grads.values()):
            torch.distributed.all_reduce(tensor)
            tensor /= 2
        if rank == 0:
            results[kind] = loss.item(), {n: g.numpy() for n, g in grads.items()}
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (str(tmp_path / "store"), results), nprocs=2)
        found = dict(results)
    for kind in KINDS:
        want_loss, want = step(kind, global_batch())
        loss, grads = found[kind]
        assert loss == pytest.approx(want_loss.item(), rel=1e-5)
        assert set(grads) == set(want)
        for name, grad in want.items():
            scale = grad.abs().max().item()
            torch.testing.assert_close(torch.as_tensor(grads[name]), grad, rtol=1e-5, atol=1e-5 * scale + 1e-9)


def test_global_mean_on_one_process():
    assert global_mean(torch.tensor(6.0), torch.tensor(3)) == 2
    assert global_mean(torch.tensor(0.0), torch.tensor(0)) == 0
