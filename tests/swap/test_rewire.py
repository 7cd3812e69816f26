"""Rewriting what reads the maps: widths, indices, levels and scales, without building anything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mila_mm.swap.probe import choose_stages
from mila_mm.swap.result import Draft, Maps, SwapRefused
from mila_mm.swap.rewire import GUESSED, Feed, rewire

RESNET = Maps((256, 512, 1024, 2048), (4, 8, 16, 32))
MILA = Maps((64, 128, 256, 512), (4, 8, 16, 32))
ALL = (0, 1, 2, 3)


def rewired(consumer, old=RESNET, new=MILA, kept=ALL, eager=False):
    draft = Draft({'head': consumer})
    rewire(draft, ('head',), Feed(old, new, kept), eager)
    return draft.config['head']


@pytest.mark.parametrize(
    ('consumer', 'expected'),
    [
        (dict(in_channels=[256, 512, 1024, 2048]), dict(in_channels=[64, 128, 256, 512])),
        (dict(in_channels=(2048, 1024, 512)), dict(in_channels=(512, 256, 128))),
        (dict(in_channels=(512, 1024, 2048)), dict(in_channels=(128, 256, 512))),
        (dict(in_channels=2048), dict(in_channels=512)),
        (dict(in_channels=1024, in_index=2), dict(in_channels=256, in_index=2)),
        (dict(in_channels=[256, 2048], in_index=[0, -1]), dict(in_channels=[64, 512], in_index=[0, -1])),
        (dict(in_channels=2048, in_index=3, c1_in_channels=256), dict(in_channels=512, in_index=3, c1_in_channels=64)),
        (
            dict(inner=[dict(in_channels=2048), dict(in_channels=7)]),
            dict(inner=[dict(in_channels=512), dict(in_channels=7)]),
        ),
        (dict(type='SingleRoIExtractor', out_channels=2048), dict(type='SingleRoIExtractor', out_channels=512)),
    ],
    ids=['list', 'reversed', 'end', 'last', 'by index', 'by indices', 'low level', 'nested', 'RoIs'],
)
def test_widths_follow_the_maps(consumer, expected) -> None:
    assert rewired(consumer) == expected


@pytest.mark.parametrize(
    'consumer',
    [
        dict(feat_channels=256, out_channels=1024, num_classes=512),
        dict(in_channels=640, in_index=3),
        dict(in_channels=[256, 512, 1024, 4096]),
        dict(with_bias=True, loss=dict(type='L1Loss', loss_weight=256)),
    ],
    ids=['own widths', 'another width', 'another list', 'no widths'],
)
def test_what_is_not_about_the_maps_stays(consumer) -> None:
    assert rewired(consumer) == consumer


def test_record_of_changes_is_the_change() -> None:
    draft = Draft({'neck': dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256)})
    rewire(draft, ('neck',), Feed(RESNET, MILA, ALL))
    (change,) = draft.merged()
    assert (change.key, change.old, change.new) == ('neck.in_channels', [256, 512, 1024, 2048], [64, 128, 256, 512])


def test_levels_and_indices_count_from_the_maps_that_are_left() -> None:
    upper = Maps((128, 256, 512), (8, 16, 32))
    neck = dict(in_channels=[256, 512, 1024, 2048], start_level=1, end_level=3)
    assert rewired(neck, new=upper, kept=(1, 2, 3)) == dict(in_channels=[128, 256, 512], start_level=0, end_level=2)
    heads = [dict(in_channels=2048, in_index=3), dict(in_channels=1024, in_index=-2)]
    assert rewired(heads, new=Maps((256, 512), (16, 32)), kept=(2, 3)) == [
        dict(in_channels=512, in_index=1),
        dict(in_channels=256, in_index=-2),
    ]


def test_scales_give_the_sizes_of_before() -> None:
    vit = Maps((768,) * 4, (16,) * 4)
    neck = dict(type='MultiLevelNeck', in_channels=[768] * 4, out_channels=768, scales=[4, 2, 1, 0.5])
    assert rewired(neck, old=vit)['scales'] == [1, 1, 1, 1]


def test_a_pyramid_on_one_map_keeps_its_proportions() -> None:
    neck = dict(type='SimpleFPN', backbone_channel=768, in_channels=[192, 384, 768, 768], out_channels=256)
    assert rewired(neck, Maps((768,), (16,)), Maps((256,), (16,)), (0,)) == dict(
        type='SimpleFPN', backbone_channel=256, in_channels=[64, 128, 256, 256], out_channels=256
    )


def test_eager_takes_every_equal_width_for_one_of_the_maps() -> None:
    ssd = Feed(Maps((512, 1024), (8, 16)), Maps((128, 256), (8, 16)), (0, 1))
    neck = dict(type='SSDNeck', in_channels=(512, 1024), out_channels=(512, 1024, 512, 256))
    draft = Draft({'neck': dict(neck)})
    rewire(draft, ('neck',), ssd)
    assert draft.config['neck']['out_channels'] == (512, 1024, 512, 256)
    rewire(draft, ('neck',), ssd, eager=True)
    assert draft.config['neck']['out_channels'] == (128, 256, 512, 256)


@pytest.mark.parametrize(
    ('head', 'expected'),
    [
        (dict(low_level=256), dict(low_level=64)),
        (dict(widths=[256, 512, 1024, 2048]), dict(widths=[64, 128, 256, 512])),
        (
            dict(
                hidden=2048,
                hidden_dim=256,
                feedforward_channels=2048,
                ffn_channels=1024,
                embed_dims=256,
                input_size=512,
                num_proposals=256,
                crop_size=(512, 1024),
                norm=dict(num_groups=256),
            ),
            None,
        ),
        # of a map that the width does not fit
        (dict(in_channels=256, in_index=3), None),
    ],
    ids=['one', 'list', 'never', 'by index'],
)
def test_eager_says_so_and_leaves_what_is_no_width_of_a_map(head, expected) -> None:
    draft = Draft({'head': dict(head)})
    rewire(draft, ('head',), Feed(RESNET, MILA, ALL), eager=True)
    assert draft.config['head'] == (expected or head)
    assert all(GUESSED in change.why and 'old map' in change.why for change in draft.changes)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True), st.data())
def test_a_single_width_by_index_always_is_that_of_its_map(widths, data) -> None:
    count = len(widths)
    old, new = Maps(tuple(widths), RESNET.strides[-count:]), Maps(MILA.channels[-count:], MILA.strides[-count:])
    index = data.draw(st.integers(-count, count - 1))
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, count - 1))) | {index % count}))
    fewer = Maps(tuple(new.channels[i] for i in kept), tuple(new.strides[i] for i in kept))
    head = rewired(dict(in_channels=widths[index], in_index=index), old, fewer, kept)
    assert head['in_channels'] == fewer.channels[head['in_index']] == new.channels[index]


@pytest.mark.parametrize(
    ('strides', 'scope', 'stages'),
    [
        ((4, 8, 16, 32), 'mmdet', (0, 1, 2, 3)),
        ((8, 16, 32), 'mmdet', (1, 2, 3)),
        ((16,), 'mmdet', (2,)),
        ((4, 8, 8, 8), 'mmseg', (0, 1, 2, 3)),
        ((16,), 'mmseg', (3,)),
        ((4,), 'mmseg', (3,)),
        ((32,), 'mmseg', (3,)),
        ((4, 8, 16), 'mmseg', (0, 1, 2)),
        ((8, 16), 'mmseg', (1, 2)),
        ((4, 32), 'mmseg', (0, 3)),
        ((4, 8, 16, 16), 'mmseg', (0, 1, 2, 3)),
        ((8, 8), 'mmseg', (2, 3)),
        ((2, 4, 8), 'mmseg', (1, 2, 3)),
        ((16, 16, 16, 16), 'mmseg', (0, 1, 2, 3)),
    ],
)
def test_stages_by_stride_or_by_depth(strides, scope, stages) -> None:
    assert choose_stages(Maps((8,) * len(strides), strides), scope) == stages


@pytest.mark.parametrize(
    ('maps', 'scope', 'words'),
    [
        (Maps((256, 256), (4, 4)), 'mmdet', 'tied to the strides'),
        (Maps((64, 128, 64), (16, 8, 4)), 'mmseg', 'finer again'),
        (Maps((16,), (2,)), 'mmseg', 'finer than the finest'),
        (Maps((8,) * 5, (2, 4, 8, 16, 32)), 'mmseg', 'gives 5 maps'),
        (Maps((3, 256, 512), (1, 4, 8)), 'mmdet', 'image itself'),
    ],
    ids=['hourglass', 'decoder', 'fine', 'five', 'image'],
)
def test_maps_that_mila_cannot_give_are_refused(maps, scope, words) -> None:
    with pytest.raises(SwapRefused, match=words):
        choose_stages(maps, scope)
