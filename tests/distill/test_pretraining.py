"""Language models learn to say the next token and to fill in hidden ones, and then teach."""

import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from slivo import losses
from slivo.distill import causal_language_model, distillation, mask_tokens, masked_language_model
from slivo.errors import RecipeError, ShapeError
from slivo.train import OptimizerSpec, fit

# Tokens 0-7 count up and begin anew; then padding, begin, end and hidden.
WORDS, PAD, BEGIN, END, HIDDEN, VOCABULARY = 8, 8, 9, 10, 11, 12
SPECIAL = (PAD, BEGIN, END, HIDDEN)


class Says(nn.Module):
    """Puts out given logits, whatever it is asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.asked = []

    def forward(self, input_ids, **_):
        self.asked.append(input_ids)
        return {"logits": self.logits}


class Language(nn.Module):
    """Knows a token's neighbors, on both sides or before it alone."""

    def __init__(self, width, *, causal):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.body = nn.Conv1d(width, width, 3)
        self.pad = (2, 0) if causal else (1, 1)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, input_ids, **_):
        mixed = self.body(F.pad(self.embed(input_ids).transpose(1, 2), self.pad)).relu()
        return self.head(self.norm(mixed.transpose(1, 2)))


def texts(count=64, seed=0):
    """Return texts that count up from anywhere, of several lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start, length in torch.randint(4, 9, (count, 2), generator=generator).tolist():
        words = [BEGIN, *((start + at) % WORDS for at in range(length)), END]
        padding = 10 - len(words)
        ids, mask = torch.tensor(words + [PAD] * padding), torch.tensor([1] * len(words) + [0] * padding)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def train(model, objective, epochs=15, seed=0):
    data = DataLoader(texts(), batch_size=16, shuffle=True)
    return fit(model, data, objective, epochs=epochs, optimizer=OptimizerSpec("adamw", lr=0.02), seed=seed)


def test_next_tokens_are_those_after_each_worked_by_hand():
    # p(1) = 3/4 after the first, p(0) = 1/4 after the second; what is said of the last is not asked.
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(1 / 3), 0.0], [50.0, 0.0]]])
    tokens = torch.tensor([[0, 1, 0]])
    found = causal_language_model()(Says(logits), {"input_ids": tokens})
    assert list(found) == ["next_token"]
    assert found["next_token"].item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)
    # Without the padded last token, and without a first one that is said after padding.
    for mask, expected in (([1, 1, 0], 3 / 4), ([0, 1, 1], 1 / 4)):
        batch = {"input_ids": tokens, "attention_mask": torch.tensor([mask])}
        assert causal_language_model()(Says(logits), batch)["next_token"].item() == pytest.approx(-math.log(expected))


def test_tokens_that_do_not_count_change_neither_value_nor_slope():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7)
    tokens, mask = torch.randint(7, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    seen = []
    for garbage in (0, 99, -100):
        model = Says(logits.masked_fill(~mask.bool()[..., None], float(garbage)))
        batch = {"input_ids": tokens.masked_fill(mask == 0, garbage), "attention_mask": mask}
        value = causal_language_model()(model, batch)["next_token"]
        (slope,) = torch.autograd.grad(value, model.logits)
        seen.append((value.detach(), slope))
    for value, slope in seen[1:]:
        torch.testing.assert_close(value, seen[0][0])
        torch.testing.assert_close(slope, seen[0][1])
    below = tokens.masked_fill(mask == 0, -100)
    torch.testing.assert_close(causal_language_model()(Says(logits), below)["next_token"].detach(), seen[0][0])


def test_is_what_transformers_have_for_their_loss():
    torch.manual_seed(0)
    tokens, mask = torch.randint(20, (3, 8)), torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    theirs = gpt(**batch, labels=tokens.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(causal_language_model()(gpt, batch)["next_token"], theirs)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertForMaskedLM(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes)).eval()
    options = {"share": 0.5, "special": [0]}
    torch.manual_seed(1)
    ours = masked_language_model(19, 20, **options)(bert, batch)["masked_token"]
    torch.manual_seed(1)
    hidden, chosen = mask_tokens(tokens, 19, 20, **options, counted=mask)
    labels = tokens.masked_fill(~chosen, -100)
    torch.testing.assert_close(ours, bert(input_ids=hidden, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_tokens_are_chosen_by_the_share_and_hidden_by_eight_in_ten(share):
    torch.manual_seed(0)
    tokens = torch.randint(WORDS, (200, 500))
    before = tokens.clone()
    hidden, chosen = mask_tokens(tokens, HIDDEN, VOCABULARY, share=share, special=SPECIAL)
    assert torch.equal(tokens, before)
    assert torch.equal(hidden[~chosen], tokens[~chosen])

    def close(found, expected, count):
        # Five standard deviations of as many throws.
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / count)

    count = int(chosen.sum())
    close(chosen.double().mean(), share, tokens.numel())
    one = 1 / VOCABULARY
    close((hidden[chosen] == HIDDEN).double().mean(), 0.8 + 0.1 * one, count)
    close((hidden[chosen] == tokens[chosen]).double().mean(), 0.1 + 0.1 * one, count)
    for token in range(VOCABULARY):
        other = hidden[chosen & (tokens != token)]
        if token != HIDDEN:
            close((other == token).double().mean(), 0.1 * one, len(other))


def test_special_tokens_and_padding_are_never_hidden():
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (50, 20))
    counted = torch.rand(50, 20) > 0.3
    hidden, chosen = mask_tokens(tokens, HIDDEN, VOCABULARY, share=1.0, special=SPECIAL, counted=counted)
    expected = counted & (tokens < WORDS)
    assert torch.equal(chosen, expected)
    assert torch.equal(hidden[~expected], tokens[~expected])
    _, chosen = mask_tokens(tokens.masked_fill(tokens == 3, -100), HIDDEN, VOCABULARY, share=1.0)
    assert torch.equal(chosen, tokens != 3)


def test_only_what_was_chosen_is_asked():
    """At chance, a model of even logits is surprised by each token alike; where it is sure and wrong, it shows."""
    model = Says(torch.zeros(4, 10, VOCABULARY))
    batch = {key: torch.stack([each[key] for each in texts(4)]) for key in ("input_ids", "attention_mask")}
    kept = batch["input_ids"].clone()
    found = masked_language_model(HIDDEN, VOCABULARY, special=SPECIAL, share=0.5)(model, batch)
    assert found["masked_token"].item() == pytest.approx(math.log(VOCABULARY))
    (slope,) = torch.autograd.grad(found["masked_token"], model.logits)
    asked = slope.abs().sum(-1) > 0
    assert 0 < asked.sum() < (kept < WORDS).sum()
    assert not asked[kept >= WORDS].any()
    assert torch.equal(batch["input_ids"], kept)
    assert not torch.equal(model.asked[0], kept)


@pytest.mark.parametrize("make", [causal_language_model, lambda: masked_language_model(HIDDEN, VOCABULARY, share=1.0)])
def test_batches_may_have_any_form_and_nothing_that_counts_is_zero(make):
    torch.manual_seed(0)
    model, tokens = Language(4, causal=True), torch.randint(WORDS, (2, 5))
    for batch in (tokens, (tokens, None), [tokens], {"input_ids": tokens}):
        (value,) = make()(model, batch).values()
        assert value.isfinite()
        assert value > 0
    nothing = {"input_ids": tokens, "attention_mask": torch.zeros(2, 5)}
    for batch in (nothing, tokens[:, :0], tokens[:0]):
        (value,) = make()(Says(torch.zeros(*_tokens(batch).shape, VOCABULARY)), batch).values()
        assert value.item() == 0
        value.backward()


def _tokens(batch):
    return batch["input_ids"] if isinstance(batch, dict) else batch


def test_whoever_has_a_tokenizer_may_train_on_what_its_collator_hides():
    words = {str(token): token for token in range(WORDS)} | {"[PAD]": PAD, "[MASK]": HIDDEN}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[PAD]")), pad_token="[PAD]", mask_token="[MASK]"
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=10, **sizes))
    loader = DataLoader(
        [{"input_ids": [at % WORDS for at in range(start, start + 6)]} for start in range(32)],
        batch_size=16,
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5),
    )
    rows = fit(
        model,
        loader,
        lambda model, batch: {"labels": model(**batch).loss},
        epochs=8,
        optimizer=OptimizerSpec("adamw", lr=0.02),
    )
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_half_precision_is_widened_first():
    torch.manual_seed(0)
    logits, tokens = (5 * torch.randn(2, 5, 300)).half(), torch.randint(300, (2, 5))
    value = causal_language_model()(Says(logits), tokens)["next_token"]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, causal_language_model()(Says(logits.float()), tokens)["next_token"])


@pytest.mark.parametrize(
    ("objective", "causal", "floor"),
    # What comes after the beginning is one of five words or so, and where a text ends is not known before.
    [(causal_language_model(), True, 0.9), (masked_language_model(HIDDEN, VOCABULARY, special=SPECIAL), False, 0.7)],
)
def test_a_model_learns_and_the_same_from_the_same_seed(objective, causal, floor):
    trained = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = Language(16, causal=causal)
        rows = train(model, objective, seed=seed)
        assert rows[0]["loss"] > 1.2
        assert rows[-1]["loss"] < floor
        trained.append(model.head.weight.detach())
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_a_teacher_that_was_trained_by_it_teaches():
    torch.manual_seed(0)
    teacher, student = Language(16, causal=False), Language(8, causal=False)
    filled = masked_language_model(HIDDEN, VOCABULARY, special=SPECIAL)
    train(teacher, filled)

    def forward(model, batch):
        return model(**batch)

    made = distillation(teacher, forward, lambda *_: None, [losses.hidden_mse(at="norm")], label_weight=0)
    batch = next(iter(DataLoader(texts(), batch_size=32)))
    data = DataLoader(texts(), batch_size=16)
    with made.prepare(student, batch):
        rows = fit(
            student,
            data,
            made,
            epochs=25,
            optimizer=OptimizerSpec("adamw", lr=0.02),
            extra_parameters=made.parameters(),
        )
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    # What it learned of the teacher's states is what the teacher's head needs to fill in what it hid.
    (adapter,) = made.adapters.values()
    with torch.no_grad():
        student.head = nn.Sequential(adapter, teacher.head)
        taught, unlearned = (
            float(filled(model, batch)["masked_token"]) for model in (student, Language(8, causal=False))
        )
    assert taught < 0.7 * unlearned


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: masked_language_model(12, 12), RecipeError, "token 12 is none of a vocabulary of 12; allowed: 0 to"),
        (lambda: masked_language_model(1, 12, special=[-1]), RecipeError, "token -1 is none"),
        (lambda: masked_language_model(1, 12, share=0), RecipeError, "share is 0; it must be above 0, and 1 at most"),
        (lambda: mask_tokens(torch.zeros(1, 2).long(), 1, 12, share=1.5), RecipeError, "share is 1.5"),
        (lambda: mask_tokens(torch.zeros(1, 2), 1, 12), ShapeError, r"torch.float32 of shape \(1, 2\); they must be"),
        (lambda: mask_tokens(torch.zeros(2).long(), 1, 12), ShapeError, r"int64 of shape \(2,\)"),
        (
            lambda: mask_tokens(torch.zeros(1, 2).long(), 1, 12, counted=torch.ones(2)),
            ShapeError,
            r"mask has shape \(2,\); there must be one for each token, shape \(1, 2\)",
        ),
        (lambda: causal_language_model()(nn.Identity(), {"x": 1}), ShapeError, "tokens of a batch are NoneType"),
        (lambda: causal_language_model()(nn.Identity(), ()), ShapeError, "tokens of a batch are NoneType"),
        (lambda: causal_language_model()(nn.Identity(), 1), ShapeError, "tokens of a batch are int"),
        (lambda: causal_language_model()(nn.Identity(), ["text"]), ShapeError, "tokens of a batch are str"),
        (
            lambda: causal_language_model()(Says(torch.zeros(1, 3)), torch.zeros(1, 3).long()),
            ShapeError,
            r"the model gives out \(1, 3\) for tokens \(1, 3\); logits are",
        ),
        (
            lambda: causal_language_model()(Says(torch.zeros(1, 3, 4)), torch.full((1, 3), 4)),
            ShapeError,
            "must be integers below 4",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
