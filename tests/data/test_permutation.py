import pytest

from llmsys.data.permutation import Permutation


@pytest.mark.parametrize("size", [*range(1, 40), 97, 100, 101, 1023, 1024, 1025])
def test_every_index_once(size):
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**70, 10**6)]:
        permutation = Permutation(size, seed, epoch)
        assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_seed_and_epoch_decide():
    orders = {tuple(Permutation(50, seed, epoch)[i] for i in range(50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    assert [Permutation(50, 3, 4)[i] for i in range(50)] == [Permutation(50, 3, 4)[i] for i in range(50)]


@pytest.mark.parametrize("size", [5, 12, 30])
def test_every_place_is_equally_likely(size):
    """Chi-squared of (index, image) counts over seeds; 3.3 standard deviations is 1 in 2000 for a fair shuffle."""
    trials = 200 * size
    counts = [[0] * size for _ in range(size)]
    for seed in range(trials):
        permutation = Permutation(size, seed, 0)
        for i in range(size):
            counts[i][permutation[i]] += 1
    expected = trials / size
    chi_squared = sum((count - expected) ** 2 / expected for row in counts for count in row)
    degrees = (size - 1) ** 2
    assert abs(chi_squared - degrees) < 3.3 * (2 * degrees) ** 0.5


def test_neighbours_part():
    """Images of neighbouring indices are as far apart as those of a fair shuffle: a third of the size on average."""
    size = 10_007
    permutation = Permutation(size, seed=0, epoch=0)
    images = [permutation[i] for i in range(size)]
    mean = sum(abs(a - b) for a, b in zip(images, images[1:], strict=False)) / (size - 1)
    assert abs(mean / size - 1 / 3) < 0.01


def test_sizes_beyond_memory():
    permutation = Permutation(10**15 + 37, seed=1, epoch=2)
    images = {permutation[i] for i in range(1000)}
    assert len(images) == 1000 and all(0 <= image < 10**15 + 37 for image in images)
