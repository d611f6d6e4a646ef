"""Batches of every shape: how many samples they have, how they are cut, and what `forward` gets of them."""

import collections
import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from pquant_lightning.core.batches import (
    batch_size,
    bind_batch,
    describe_batch,
    first_samples,
    main_output,
    map_tensors,
    tensors_in,
)
from pquant_lightning.core.errors import CalibrationError


class Data:
    """Of the shape of torch_geometric's `Data`: attributes in a store, `to_dict`, `apply`, `to`."""

    def __init__(self, **entries: Any) -> None:
        self.store = entries

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["store"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __copy__(self) -> "Data":
        twin = type(self).__new__(type(self))
        twin.__dict__["store"] = dict(self.store)
        return twin

    def __len__(self) -> int:
        return len(self.store)  # as there: of the attributes

    def to_dict(self) -> dict[str, Any]:
        return dict(self.store)

    def apply(self, change: Any) -> "Data":
        for key, value in self.store.items():
            self.store[key] = change(value) if isinstance(value, Tensor) else value
        return self

    def to(self, device: Any) -> "Data":
        return self.apply(lambda tensor: tensor.to(device))


class Graphs(Data):
    """Of the shape of its `Batch`: graphs of several sizes one after the other."""

    @property
    def num_graphs(self) -> int:
        return int(self.batch.max()) + 1

    def to_data_list(self) -> list[Data]:
        return [Data(x=self.x[self.batch == graph]) for graph in range(self.num_graphs)]

    @classmethod
    def from_data_list(cls, graphs: list[Data]) -> "Graphs":
        batch = torch.cat([torch.full((len(graph.x),), place) for place, graph in enumerate(graphs)])
        return cls(x=torch.cat([graph.x for graph in graphs]), batch=batch)


@dataclass
class Images:
    """Of the shape of anomalib's batches."""

    image: Tensor
    label: Tensor
    path: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.image.dim() == 4, "made anew"

    @property
    def batch_size(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class Molecules:
    """Of the shape of chemprop's: atoms of several molecules."""

    atoms: Tensor
    of: Tensor

    def __len__(self) -> int:
        return int(self.of.max()) + 1


class Training(NamedTuple):
    """A batch that begins with an object."""

    molecules: Molecules
    extra: Tensor | None
    target: Tensor


def graphs() -> Graphs:
    return Graphs.from_data_list([Data(x=torch.full((n, 4), float(n))) for n in (3, 5, 2)])


def pictures(*sizes: int) -> list[Tensor]:
    return [torch.full((3, size, size + 1), float(size)) for size in sizes]


MOLECULES = Molecules(torch.arange(6.0), torch.tensor([0, 0, 0, 1, 2, 2]))
BOXES = [{"boxes": torch.zeros(n, 4), "labels": torch.zeros(n)} for n in (3, 1, 2, 0)]
MASKED = {"input_ids": torch.zeros(6, 9), "attention_mask": torch.zeros(6, 9)}


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((pictures(6, 7, 8, 9), None), 4),  # a channel axis of 3 is no batch
        ([pictures(6, 6), None], 2),
        ((pictures(6), BOXES[:1]), 1),
        ((tuple(pictures(6, 6, 6, 6)), tuple(BOXES)), 4),
        ((pictures(6, 6), torch.tensor([4, 7])), 2),
        ([{"image": image, "height": 5} for image in pictures(6, 7)], 2),
        ([(image, torch.tensor(1)) for image in pictures(6, 6)], 2),
        ([[torch.zeros(5, 3), torch.zeros(9, 3)], torch.zeros(2)], 2),  # clouds of points
        ([[torch.zeros(8, 3), torch.zeros(8, 7)], torch.zeros(8)], 8),  # two inputs
        ([[torch.zeros(3, 5, 6), torch.zeros(3, 5, 6)], torch.zeros(3)], 3),  # two series of three samples
        ([[torch.zeros(8, 3, 32, 32), torch.zeros(8, 3, 32, 32)], torch.zeros(8)], 8),  # two views
        ([torch.zeros(8, 3, 9, 9), torch.zeros(8, 3, 9, 9)], 8),
        ((torch.zeros(3, 16, 6),), 3),  # three sequences
        ((torch.zeros(3, 16, 6), torch.zeros(3, 16, 6)), 3),
        ([MASKED, MASKED], 6),  # a pair of sentences
        (graphs(), 3),
        ((graphs(), torch.zeros(3)), 3),
        (Data(x=torch.zeros(7, 2)), 1),
        (Images(torch.zeros(5, 3, 4, 4), torch.zeros(5)), 5),
        (Training(MOLECULES, None, torch.zeros(3, 1)), 3),
        (pack_sequence([torch.zeros(4, 2), torch.zeros(2, 2)]), 2),
        (collections.OrderedDict(x=torch.zeros(4, 2)), 4),
        (collections.UserDict(x=torch.zeros(4, 2)), 4),
        (["a sentence", "another", "a third"], 3),
        (({"x": torch.zeros(4, 2), "groups": torch.zeros(4, 1)}, (torch.zeros(4, 6), None)), 4),  # forecasting
    ],
)
def test_samples_are_counted(batch: Any, size: int) -> None:
    assert batch_size(batch) == size
    assert batch_size(first_samples(batch, 1)) in (1, size)


class TestCut:
    def test_a_list_of_images_loses_images(self) -> None:
        images, targets = first_samples((pictures(6, 7, 8, 9), BOXES), 2)
        assert [image.shape for image in images] == [(3, 6, 7), (3, 7, 8)]
        assert [len(target["boxes"]) for target in targets] == [3, 1]

    def test_what_might_be_either_is_left_whole(self) -> None:
        batch = (pictures(6, 6, 6, 6), None)
        assert first_samples(batch, 2) is batch

    def test_graphs(self) -> None:
        given = graphs()
        cut = first_samples(given, 2)
        assert type(cut) is Graphs
        assert cut.x.tolist() == given.x[:8].tolist()
        assert cut.num_graphs == 2

    def test_objects_whose_tensors_are_not_one_entry_per_sample(self) -> None:
        batch = Training(MOLECULES, None, torch.zeros(3, 1))
        assert first_samples(batch, 1) is batch
        single = Data(x=torch.zeros(7, 2))
        assert first_samples(single, 1) is single

    def test_dataclasses_keep_their_type_and_their_own_checks_out(self) -> None:
        cut = first_samples(Images(torch.zeros(5, 3, 4, 4), torch.arange(5.0)), 2)
        assert type(cut) is Images
        assert cut.label.tolist() == [0, 1]


class TestMap:
    @pytest.mark.parametrize(
        "value",
        [
            graphs(),
            Data(x=torch.ones(3)),
            Images(torch.ones(1, 1, 1, 1), torch.ones(1), ["a"]),
            Training(MOLECULES, None, torch.ones(3)),
            collections.defaultdict(list, x=[torch.ones(2)]),
            collections.UserDict(x=torch.ones(2)),
            collections.deque([torch.ones(2), "a"]),
            ({"x": (torch.ones(1), [None, torch.ones(2)])}, 5),
        ],
    )
    def test_every_tensor_is_changed_and_the_given_value_stays(self, value: Any) -> None:
        before = [tensor.clone() for tensor in tensors_in(value)]
        new = map_tensors(lambda tensor: tensor + 1, value)
        assert type(new) is type(value)
        assert before
        assert [t.tolist() for t in tensors_in(new)] == [(t + 1).tolist() for t in before]
        assert [t.tolist() for t in tensors_in(value)] == [t.tolist() for t in before]

    def test_transformers_outputs_and_batches(self) -> None:
        transformers = pytest.importorskip("transformers")
        batch = transformers.BatchEncoding({"input_ids": torch.ones(2, 3)})
        assert type(map_tensors(torch.neg, batch)) is type(batch)
        output = transformers.modeling_outputs.SequenceClassifierOutput(loss=torch.ones(()), logits=torch.ones(2, 4))
        assert main_output(map_tensors(torch.neg, output)).tolist() == [[-1.0] * 4] * 2


@pytest.mark.parametrize(
    ("output", "value"),
    [
        (Images(torch.zeros(1, 1, 1, 1), torch.ones(1)), 0),
        (Training(MOLECULES, None, torch.ones(3)), 0),
        (Data(index=torch.zeros(3, dtype=torch.long), x=torch.ones(3)), 1),
        ({"out": {"scores": torch.ones(2)}}, 1),
    ],
)
def test_the_output_that_is_compared(output: Any, value: float) -> None:
    assert float(main_output(output).flatten()[0]) == value


class Sentences(nn.Module):
    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> Tensor:
        return features["input_ids"]


class Detector(nn.Module):
    def forward(self, images: list[Tensor], targets: Any = None) -> Tensor:
        return torch.stack([image.mean() for image in images])


class Network(nn.Module):
    def forward(self, x: Tensor, batch: Tensor, weight: Tensor | None = None) -> Tensor:
        return x


class TestBind:
    def test_a_dict_for_one_argument_beside_any_names(self) -> None:
        (args, kwargs) = bind_batch(Sentences(), MASKED)
        assert args[0] is MASKED
        assert kwargs == {}
        assert bind_batch(Sentences(), (MASKED, torch.zeros(6)))[0][0] is MASKED

    @pytest.mark.parametrize("targets", [None, BOXES[:2]])
    def test_a_list_of_images_is_one_argument(self, targets: Any) -> None:
        batch = (pictures(6, 6), targets)
        args, _ = bind_batch(Detector(), batch)
        assert args[0] is batch[0]
        assert Detector()(*args).tolist() == [6, 6]

    def test_three_sequences_are_no_image(self) -> None:
        batch = (torch.zeros(3, 16, 6),)
        assert bind_batch(Detector(), batch)[0] == batch

    def test_a_list_of_dicts_is_one_argument(self) -> None:
        batch = [{"image": image} for image in pictures(6, 7)]
        assert bind_batch(Detector(), batch)[0] == (batch,)

    def test_the_entries_of_an_object_that_forward_names(self) -> None:
        given = graphs()
        assert bind_batch(Network(), given) == ((), {"x": given.x, "batch": given.batch})
        assert bind_batch(Sentences(), given) == ((given,), {})

    def test_an_object_without_them(self) -> None:
        with pytest.raises(CalibrationError, match="forward requires x, batch"):
            bind_batch(Network(), (MOLECULES,))


def test_a_description_of_objects() -> None:
    assert describe_batch(copy.copy(MOLECULES)) == "Molecules with atoms: float32 (6,), of: int64 (6,)"
    assert describe_batch(Data(x=torch.zeros(2, 1))) == "Data with x: float32 (2, 1)"
