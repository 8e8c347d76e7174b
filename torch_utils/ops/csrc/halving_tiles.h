// SPDX-License-Identifier: MIT
// Tiles of images for the convolution with 4x4 kernels of stride 2, and where they lie in memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "products.h"

namespace halving {

using V = Lanes<float>;

constexpr int64_t kTilesPerGroup = 64;
constexpr int64_t kRowPadding = 16;  // a cache line, as rows a power of two apart share few places of a cache

constexpr int kStride = 2, kPhases = kStride * kStride;
constexpr int kTaps = 2;                         // of each phase's kernel, along one axis
constexpr int kOut = 2, kIn = kOut + kTaps - 1;  // sides of tiles of outputs and of a phase
constexpr int kPoints = kIn * kIn, kOutPixels = kOut * kOut, kKernelTaps = kTaps * kTaps;

constexpr Matrix<kIn, kIn> kInput{{{1, -1, 0}, {0, 1, 0}, {0, 1, -1}}};  // B^T
constexpr Matrix<kIn, kTaps> kKernel{{{1, 0}, {1, 1}, {0, 1}}};           // G
constexpr Matrix<kOut, kIn> kOutput{{{1, 1, 0}, {0, 1, -1}}};             // A^T
constexpr auto kInputAdjoint = kInput.transposed();
constexpr auto kKernelAdjoint = kKernel.transposed();
constexpr auto kOutputAdjoint = kOutput.transposed();

// Channels-last images or kernels; strides in elements.
template <typename T> struct View {
    T* data;
    int64_t size[4], stride[4];
    explicit View(const at::Tensor& t) : data(const_cast<T*>(static_cast<const T*>(t.const_data_ptr()))) {
        for (int i = 0; i < 4; ++i) size[i] = t.size(i), stride[i] = t.stride(i);
    }
    View from_channel(int64_t channel) const {
        View rest = *this;
        rest.data += channel * stride[1];
        return rest;
    }
};

enum class Layout { kRows, kPanels };  // whole rows one after the other, or those of kBlockColumns columns

// kPoints matrices of the same size, one after the other.
struct Planes {
    int64_t row, panel, plane;  // elements between rows, between panels of columns and between matrices
    at::Tensor memory;
    float* data;
    Planes(int64_t rows, int64_t columns, Layout layout)
        : row(layout == Layout::kRows ? columns + kRowPadding : kBlockColumns),
          panel(layout == Layout::kRows ? kBlockColumns : rows * kBlockColumns + kRowPadding),
          plane(layout == Layout::kRows ? rows * row : columns / kBlockColumns * panel),
          memory(at::empty({kPoints * plane}, at::kFloat)),
          data(memory.data_ptr<float>()) {}
    float* at(int64_t point, int64_t r = 0, int64_t column = 0) const {
        return data + point * plane + r * row + column / kBlockColumns * panel + column % kBlockColumns;
    }
    Panels panels(int64_t point, int64_t column = 0) const { return {at(point, 0, column), row, panel}; }
    // The same memory without its first `r` rows.
    Planes below(int64_t r) const {
        Planes rest = *this;
        rest.data += r * row;
        return rest;
    }
};

// Everything about one call: x (N, C, H, W), kernel (O, C, 4, 4), y (N, O, H', W').
struct Geometry {
    int64_t padding, channels, out_channels, inner;  // inner: channels of all phases
    int64_t num_images, height, width, out_height, out_width, tiles_y, tiles_x;
    int64_t images_per_group;

    Geometry(at::IntArrayRef x, at::IntArrayRef w, at::IntArrayRef y, int64_t padding)
        : padding(padding), channels(x[1]), out_channels(w[0]), inner(x[1] * kPhases),
          num_images(x[0]), height(x[2]), width(x[3]), out_height(y[2]), out_width(y[3]),
          tiles_y((y[2] + kOut - 1) / kOut), tiles_x((y[3] + kOut - 1) / kOut),
          images_per_group(count_images_per_group()) {}
    // As many as fill a group, unless a thread would have none.
    int64_t count_images_per_group() const {
        const int64_t share = (num_images + at::get_num_threads() - 1) / at::get_num_threads();
        return std::max<int64_t>(std::min(kTilesPerGroup / tiles(), share), 1);
    }
    int64_t tiles() const { return tiles_y * tiles_x; }
    int64_t num_groups() const { return (num_images + images_per_group - 1) / images_per_group; }
    int64_t group_size() const { return images_per_group * tiles(); }
    int64_t all_tiles() const { return num_images * tiles(); }
    // Whether all images' transforms take less memory than two kernels'.
    bool has_few_tiles() const { return all_tiles() * (inner + out_channels) < 2 * inner * out_channels; }
    Planes input_planes() const { return {group_size(), inner, Layout::kRows}; }
    Planes output_planes(Layout layout) const { return {group_size(), out_channels, layout}; }

    // f(tile of the group, image, tile row, tile column)
    template <typename F> void for_tiles(int64_t group, const F& f) const {
        const int64_t end = std::min((group + 1) * images_per_group, num_images);
        int64_t tile = 0;
        for (int64_t image = group * images_per_group; image < end; ++image)
            for (int64_t ty = 0; ty < tiles_y; ++ty)
                for (int64_t tx = 0; tx < tiles_x; ++tx) f(tile++, image, ty, tx);
    }
    int64_t tiles_in(int64_t group) const {
        return (std::min((group + 1) * images_per_group, num_images) - group * images_per_group) * tiles();
    }

    // f(place of the element in its tile, pixel) for the pixels of an input tile that lie in the image.
    template <typename T, typename F>
    void for_inputs(const View<T>& x, int64_t image, int64_t ty, int64_t tx, int64_t phase,
                    const F& f) const {
        const int64_t y0 = kStride * ty * kOut + phase / kStride - padding,
                      x0 = kStride * tx * kOut + phase % kStride - padding;
        for (int i = 0; i < kIn; ++i)
            for (int j = 0; j < kIn; ++j) {
                const int64_t row = y0 + kStride * i, column = x0 + kStride * j;
                if (row >= 0 && row < height && column >= 0 && column < width)
                    f(i * kIn + j, x.data + image * x.stride[0] + row * x.stride[2] + column * x.stride[3]);
            }
    }
    template <typename T, typename F>
    void for_outputs(const View<T>& y, int64_t image, int64_t ty, int64_t tx, const F& f) const {
        for (int i = 0; i < kOut; ++i)
            for (int j = 0; j < kOut; ++j) {
                const int64_t row = ty * kOut + i, column = tx * kOut + j;
                if (row < out_height && column < out_width)
                    f(i * kOut + j, y.data + image * y.stride[0] + row * y.stride[2] + column * y.stride[3]);
            }
    }
};

}  // namespace halving
