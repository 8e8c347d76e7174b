// SPDX-License-Identifier: MIT
// 3x3 convolutions of stride 1 by Winograd's minimal filtering: a quarter of the multiplications.
//
//     images -> patches of 6x6 -> V[36][channel][tile]      weights -> U[36][out channel][channel]
//     M[k] = U[k] V[k], 36 matrix products by torch's BLAS;  M -> tiles of 4x4 -> images
//
// The transforms are those of winograd_axes.h, along both axes. A block of tile rows at a time, whose V and M
// stay near the processor. Images are convolved one by one, so that a result does not depend on the batch.
// The gradient of the weights is the transposed algorithm: gradients D[36][out channel][tile] of M, times V,
// summed over tiles.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "winograd_tiles.h"

namespace {

using at::Tensor;

constexpr int64_t kRowsPerTask = 16;  // of a matrix of weights
constexpr int64_t kColumnsPerPass = 64;

// Matrices of 3x3 weights: element (row, column) begins at row * row_step + column * column_step.
struct Matrix {
    int64_t rows, columns, row_step, column_step;
    bool is_flipped;
};

// `visit` is called with row, first column and length, at most eight, of all runs; in parallel, and in an
// order that suits the caches.
template <typename F> void for_each_run(const Matrix& m, const F& visit) {
    at::parallel_for(0, ceil_div(m.rows, kRowsPerTask), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t last_row = std::min(m.rows, (task + 1) * kRowsPerTask);
            for (int64_t pass = 0; pass < m.columns; pass += kColumnsPerPass)
                for (int64_t row = task * kRowsPerTask; row < last_row; ++row)
                    for (int64_t c = pass; c < std::min(m.columns, pass + kColumnsPerPass); c += kLanes)
                        visit(row, c, static_cast<int>(std::min<int64_t>(kLanes, m.columns - c)));
        }
    });
}

// U[36][row][column].
template <typename T> void transform_weights(const Matrix& m, const T* weights, T* to) {
    using V = Lanes<T>;
    const int64_t step = step_of(m.rows, m.columns);
    for_each_run(m, [&](int64_t row, int64_t column, int count) {
        const T* from = weights + row * m.row_step + column * m.column_step;
        V block[kLanes], last{}, taps[9];
        for (int lane = 0; lane < kLanes; ++lane) {
            const T* one = from + (lane < count ? lane : 0) * m.column_step;
            block[lane] = read<V>(one);
            last[lane] = one[8];
        }
        transpose(block);
        for (int k = 0; k < 9; ++k) taps[m.is_flipped ? 8 - k : k] = k == 8 ? last : block[k];
        V mixed[3][kPatch];
        for (int x = 0; x < 3; ++x) {
            const V g[3] = {taps[x], taps[3 + x], taps[6 + x]};
            transform_weight<T>(g, mixed[x]);
        }
        T* place = to + row * m.columns + column;
        for (int y = 0; y < kPatch; ++y) {
            const V g[3] = {mixed[0][y], mixed[1][y], mixed[2][y]};
            V u[kPatch];
            transform_weight<T>(g, u);
            for (int x = 0; x < kPatch; ++x) {
                if (count == kLanes) write(place + (y * kPatch + x) * step, u[x]);
                else std::memcpy(place + (y * kPatch + x) * step, &u[x], count * sizeof(T));
            }
        }
    });
}

// Transposed: from the gradient of U to that of the weights.
template <typename T> void transform_weights_back(const Matrix& m, const T* from, T* weights) {
    using V = Lanes<T>;
    const int64_t step = step_of(m.rows, m.columns);
    for_each_run(m, [&](int64_t row, int64_t column, int count) {
        V mixed[3][kPatch], taps[9];
        for (int x = 0; x < kPatch; ++x) {
            V u[kPatch], g[3];
            for (int y = 0; y < kPatch; ++y) {
                const T* place = from + (y * kPatch + x) * step + row * m.columns + column;
                u[y] = V{};
                if (count == kLanes) u[y] = read<V>(place);
                else std::memcpy(&u[y], place, count * sizeof(T));
            }
            transform_weight_gradient<T>(u, g);
            for (int y = 0; y < 3; ++y) mixed[y][x] = g[y];
        }
        for (int y = 0; y < 3; ++y) {
            V g[3];
            transform_weight_gradient<T>(mixed[y], g);
            for (int x = 0; x < 3; ++x) taps[3 * y + x] = g[x];
        }
        T* to = weights + row * m.row_step + column * m.column_step;
        for (int lane = 0; lane < count; ++lane)
            for (int k = 0; k < 9; ++k) to[lane * m.column_step + k] = taps[k][lane];
    });
}

// Tile rows begin..end of each of the images first..last.
struct Block {
    int64_t first, last, begin, end;

    int64_t num_tiles(const Tiles& tiles) const { return (last - first) * (end - begin) * tiles.columns; }
};

// V or D of a block.
template <typename T, int kSize>
void gather(const Tiles& tiles, const Block& block, const Tensor& images, int64_t padding, Tensor& to) {
    const int64_t channels = images.size(1), size = images.size(2) * images.size(3);
    const int64_t count = block.num_tiles(tiles), step = step_of(channels, count);
    const int64_t per_image = count / (block.last - block.first);
    const T* from = images.const_data_ptr<T>();
    T* values = to.mutable_data_ptr<T>();
    at::parallel_for(0, channels, 1, [&](int64_t first, int64_t last) {
        Gatherer<T, kSize> gatherer(tiles, images.size(2), images.size(3), padding);
        for (int64_t c = first; c < last; ++c)
            for (int64_t n = block.first; n < block.last; ++n) {
                const int64_t place = (n - block.first) * per_image;
                gatherer.run(from + (n * channels + c) * size, block.begin, block.end,
                             values + c * count + place, step, count - place);
            }
    });
}

// Images of a block of one image, from M.
template <typename T> void scatter(const Tiles& tiles, const Block& block, const Tensor& from, Tensor& out) {
    const int64_t channels = out.size(1), size = tiles.height * tiles.width;
    const int64_t count = block.num_tiles(tiles), step = step_of(channels, count);
    const T* products = from.const_data_ptr<T>();
    T* image = out.mutable_data_ptr<T>() + block.first * channels * size;
    at::parallel_for(0, channels, 1, [&](int64_t first, int64_t last) {
        Scatterer<T> scatterer(tiles);
        for (int64_t c = first; c < last; ++c)
            scatterer.run(products + c * count, step, block.begin, block.end, image + c * size);
    });
}

// Room for [36][rows][columns], and for a vector to be read that begins with the last element.
Tensor make_room(const Tensor& like, int64_t rows, int64_t columns) {
    return at::empty({kTaps * step_of(rows, columns) + kLanes}, like.options());
}

Tensor as_matrices(const Tensor& room, int64_t rows, int64_t columns) {
    return room.as_strided({kTaps, rows, columns}, {step_of(rows, columns), columns, 1});
}

// out = a b + keep * out for each of the 36 matrices. Each is one thread's: the BLAS, left to itself, makes
// the threads wait for one another 36 times.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, int keep) {
    at::parallel_for(0, kTaps, 1, [&](int64_t begin, int64_t end) {
        at::AutoDispatchBelowADInplaceOrView guard;  // a thread of the pool knows nothing of inference mode
        Tensor sum = out.narrow(0, begin, end - begin);
        at::baddbmm_out(sum, sum, a.narrow(0, begin, end - begin), b.narrow(0, begin, end - begin), keep, 1);
    });
}

// `visit` is called with all blocks: of a part of one image, or of `group` whole ones.
template <typename F>
void for_each_block(const Tiles& tiles, int64_t num_images, int64_t group, const F& visit) {
    const int64_t rows = tiles.rows_per_block();
    for (int64_t n = 0; n < num_images; n += group)
        for (int64_t begin = 0; begin < tiles.rows; begin += rows)
            visit(Block{n, std::min(n + group, num_images), begin, std::min(begin + rows, tiles.rows)});
}

template <typename T>
void convolve(const Tiles& tiles, const Tensor& x, const Matrix& m, const T* weights, int64_t padding,
              Tensor& out) {
    const int64_t most = tiles.rows_per_block() * tiles.columns;
    Tensor u = make_room(x, m.rows, m.columns), v = make_room(x, m.columns, most),
           p = make_room(x, m.rows, most);
    transform_weights(m, weights, u.mutable_data_ptr<T>());
    const Tensor weight_matrices = as_matrices(u, m.rows, m.columns);
    for_each_block(tiles, x.size(0), 1, [&](const Block& block) {
        const int64_t count = block.num_tiles(tiles);
        gather<T, kPatch>(tiles, block, x, padding, v);
        const Tensor patches = as_matrices(v, m.columns, count), products = as_matrices(p, m.rows, count);
        multiply(products, weight_matrices, patches, 0);
        scatter<T>(tiles, block, p, out);
    });
}

template <typename T>
void sum_weight_gradient(const Tiles& tiles, const Tensor& x, const Tensor& grad, int64_t padding,
                         Tensor& out) {
    const Matrix m{grad.size(1), x.size(1), 9 * x.size(1), 9, false};
    const int64_t group = std::clamp<int64_t>(kTilesPerBlock / (tiles.rows * tiles.columns), 1, x.size(0));
    const int64_t most = group * tiles.rows_per_block() * tiles.columns;
    Tensor u = make_room(x, m.rows, m.columns), v = make_room(x, m.columns, most),
           d = make_room(x, m.rows, most);
    const Tensor sums = as_matrices(u, m.rows, m.columns);
    int have_sums = 0;
    for_each_block(tiles, x.size(0), group, [&](const Block& block) {
        const int64_t count = block.num_tiles(tiles);
        gather<T, kPatch>(tiles, block, x, padding, v);
        gather<T, kTile>(tiles, block, grad, 0, d);
        const Tensor patches = as_matrices(v, m.columns, count).transpose(1, 2);
        multiply(sums, as_matrices(d, m.rows, count), patches, have_sums);
        have_sums = 1;
    });
    transform_weights_back(m, u.const_data_ptr<T>(), out.mutable_data_ptr<T>());
}

void check(const Tensor& images, const Tensor& other) {
    TORCH_CHECK(images.dim() == 4 && other.dim() == 4 && images.scalar_type() == other.scalar_type(),
                "need two tensors with four axes and of one type");
    TORCH_CHECK(images.scalar_type() == at::kFloat || images.scalar_type() == at::kDouble, "images of ",
                images.scalar_type(), ": need float32 or float64");
}

// See winograd.py for what the operators compute.
Tensor winograd_conv(const Tensor& images, const Tensor& w, int64_t padding, bool is_adjoint) {
    check(images, w);
    const Tensor x = images.contiguous(), weights = w.contiguous();
    const int64_t rows = w.size(0), columns = w.size(1);
    const Matrix m = is_adjoint ? Matrix{columns, rows, 9, 9 * columns, true}
                                : Matrix{rows, columns, 9 * columns, 9, false};
    const Tiles tiles{x.size(2) + 2 * padding - 2, x.size(3) + 2 * padding - 2};
    TORCH_CHECK(w.size(2) == 3 && w.size(3) == 3 && x.size(1) == m.columns,
                "the weights do not fit the images");
    TORCH_CHECK(tiles.height > 0 && tiles.width > 0,
                "the images are smaller than the kernel: increase the padding");
    Tensor out = at::empty({x.size(0), m.rows, tiles.height, tiles.width}, x.options());
    if (out.numel() == 0) return out;
    if (x.scalar_type() == at::kFloat)
        convolve(tiles, x, m, weights.const_data_ptr<float>(), padding, out);
    else
        convolve(tiles, x, m, weights.const_data_ptr<double>(), padding, out);
    return out;
}

Tensor winograd_weight_gradient(const Tensor& images, const Tensor& grad, int64_t padding) {
    check(images, grad);
    const Tensor x = images.contiguous(), g = grad.contiguous();
    const Tiles tiles{g.size(2), g.size(3)};
    TORCH_CHECK(x.size(0) == g.size(0) && tiles.height == x.size(2) + 2 * padding - 2 &&
                    tiles.width == x.size(3) + 2 * padding - 2,
                "the gradient does not fit the images");
    Tensor out = at::zeros({g.size(1), x.size(1), 3, 3}, x.options());
    if (out.numel() == 0 || g.numel() == 0) return out;
    if (x.scalar_type() == at::kFloat)
        sum_weight_gradient<float>(tiles, x, g, padding, out);
    else
        sum_weight_gradient<double>(tiles, x, g, padding, out);
    return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(stylesan_cpu, m) {
    m.def("winograd_conv(Tensor x, Tensor w, int padding, bool is_adjoint) -> Tensor");
    m.def("winograd_weight_gradient(Tensor x, Tensor grad, int padding) -> Tensor");
}

TORCH_LIBRARY_IMPL(stylesan_cpu, CPU, m) {
    m.impl("winograd_conv", winograd_conv);
    m.impl("winograd_weight_gradient", winograd_weight_gradient);
}
