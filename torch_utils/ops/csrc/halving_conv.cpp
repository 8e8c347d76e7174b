// SPDX-License-Identifier: MIT
// Convolution with 4x4 kernels of stride 2 in 9/16 of the multiplications (Winograd; Lavin and Gray,
// arXiv:1509.09308), and its gradients. It has a 2x2 kernel on the input's four phases, taken as channels.
//
// A 2x2 tile of the output depends on 3x3 pixels of each phase. With constant matrices B, G, A of 0, 1 and -1
//
//     output tile = A^T [(G w G^T) * (B^T input B)] A,  * element by element, summed over channels and phases
//
// so that for each of the nine elements all tiles and channels together are one matrix product. The gradients
// are the adjoint of each factor. Groups of whole images are taken whose transforms stay in the cache. What
// comes out for an image does not depend on the others: sums run over channels in their order.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "products.h"

namespace {

using at::Tensor;
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
    explicit View(const Tensor& t) : data(const_cast<T*>(static_cast<const T*>(t.const_data_ptr()))) {
        for (int i = 0; i < 4; ++i) size[i] = t.size(i), stride[i] = t.stride(i);
    }
};

enum class Layout { kRows, kPanels };  // whole rows one after the other, or those of kBlockColumns columns

// kPoints matrices of the same size, one after the other.
struct Planes {
    int64_t row, panel, plane;  // elements between rows, between panels of columns and between matrices
    Tensor memory;
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
    Panels panels(int64_t point) const { return {at(point), row, panel}; }
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

class Convolution {
  public:
    explicit Convolution(const Geometry& g) : g_(g), outside_(std::max(g.channels, g.out_channels)) {}

    // Kernels to planes (out_channels, inner).
    Planes transform_kernel(const View<const float>& w) const {
        const Planes planes(g_.out_channels, g_.inner, Layout::kPanels);
        for_kernels(1, [&](int64_t o, int64_t phase, int64_t channel) {
            V transformed[kPoints];
            transform_taps(transformed, w, o, phase, channel);
            for (int p = 0; p < kPoints; ++p)
                write(planes.at(p, o, phase * g_.channels + channel), transformed[p]);
        });
        return planes;
    }

    // Kernels to planes (inner, out_channels).
    Planes transform_kernel_transposed(const View<const float>& w) const {
        const Planes planes(g_.inner, g_.out_channels, Layout::kPanels);
        for_kernels(kLanes, [&](int64_t o, int64_t phase, int64_t channel) {
            V transformed[kLanes][kPoints];
            for (int l = 0; l < kLanes; ++l) transform_taps(transformed[l], w, o + l, phase, channel);
            const int64_t row = phase * g_.channels + channel;
            for (int p = 0; p < kPoints; ++p) {
                V square[kLanes];
                for (int l = 0; l < kLanes; ++l) square[l] = transformed[l][p];
                transpose(square);
                for (int l = 0; l < kLanes; ++l) write(planes.at(p, row + l, o), square[l]);
            }
        });
        return planes;
    }

    // The adjoint: planes (inner, out_channels) to kernels.
    void store_kernel(const Planes& planes, const View<float>& w) const {
        for_kernels(kLanes, [&](int64_t o, int64_t phase, int64_t channel) {
            V transformed[kLanes][kPoints];
            const int64_t row = phase * g_.channels + channel;
            for (int p = 0; p < kPoints; ++p) {
                V square[kLanes];
                for (int l = 0; l < kLanes; ++l) square[l] = read<V>(planes.at(p, row + l, o));
                transpose(square);
                for (int l = 0; l < kLanes; ++l) transformed[l][p] = square[l];
            }
            for (int l = 0; l < kLanes; ++l) {
                V taps[kKernelTaps];
                sandwich<kKernelAdjoint, kTaps, kIn>(taps, transformed[l]);
                for (int t = 0; t < kKernelTaps; ++t) {
                    float* to = tap_of(w, t, o + l, phase, channel);
                    if (w.stride[1] == 1)
                        write(to, taps[t]);
                    else
                        for (int c = 0; c < kLanes; ++c) to[c * w.stride[1]] = taps[t][c];
                }
            }
        });
    }

    // Input tiles of a group to planes (tiles, inner).
    void transform_inputs(const View<const float>& x, int64_t group, const Planes& planes) const {
        g_.for_tiles(group, [&](int64_t tile, int64_t image, int64_t ty, int64_t tx) {
            for (int64_t phase = 0; phase < kPhases; ++phase) {
                const float* pixels[kPoints];
                std::fill_n(pixels, kPoints, outside_.data());
                g_.for_inputs(x, image, ty, tx, phase, [&](int at, auto pixel) { pixels[at] = pixel; });
                float* to = planes.at(0, tile, phase * g_.channels);
                for (int64_t c = 0; c < g_.channels; c += kLanes) {
                    V elements[kPoints], transformed[kPoints];
                    for (int p = 0; p < kPoints; ++p) elements[p] = read<V>(pixels[p] + c);
                    sandwich<kInput, kIn, kIn>(transformed, elements);
                    for (int p = 0; p < kPoints; ++p) write(to + p * planes.plane + c, transformed[p]);
                }
            }
        });
    }

    // The adjoint: adds planes (tiles, inner) to the pixels that they came from.
    void scatter_inputs(const Planes& planes, int64_t group, const View<float>& x) const {
        g_.for_tiles(group, [&](int64_t tile, int64_t image, int64_t ty, int64_t tx) {
            for (int64_t phase = 0; phase < kPhases; ++phase) {
                float* pixels[kPoints] = {};
                g_.for_inputs(x, image, ty, tx, phase, [&](int at, auto pixel) { pixels[at] = pixel; });
                const float* from = planes.at(0, tile, phase * g_.channels);
                for (int64_t c = 0; c < g_.channels; c += kLanes) {
                    V elements[kPoints], transformed[kPoints];
                    for (int p = 0; p < kPoints; ++p) transformed[p] = read<V>(from + p * planes.plane + c);
                    sandwich<kInputAdjoint, kIn, kIn>(elements, transformed);
                    for (int p = 0; p < kPoints; ++p)
                        if (pixels[p]) write(pixels[p] + c, read<V>(pixels[p] + c) + elements[p]);
                }
            }
        });
    }

    // Planes (tiles, out_channels) to output tiles.
    void transform_outputs(const Planes& planes, int64_t group, const float* bias,
                           const View<float>& y) const {
        g_.for_tiles(group, [&](int64_t tile, int64_t image, int64_t ty, int64_t tx) {
            float* pixels[kOutPixels] = {};
            g_.for_outputs(y, image, ty, tx, [&](int at, float* pixel) { pixels[at] = pixel; });
            const float* from = planes.at(0, tile);
            for (int64_t c = 0; c < g_.out_channels; c += kLanes) {
                const V shift = bias ? read<V>(bias + c) : V{};
                V transformed[kPoints], elements[kOutPixels];
                for (int p = 0; p < kPoints; ++p) transformed[p] = read<V>(from + p * planes.plane + c);
                sandwich<kOutput, kOut, kIn>(elements, transformed);
                for (int p = 0; p < kOutPixels; ++p)
                    if (pixels[p]) write(pixels[p] + c, elements[p] + shift);
            }
        });
    }

    // The adjoint: output tiles to planes (tiles, out_channels).
    void gather_outputs(const View<const float>& y, int64_t group, const Planes& planes) const {
        g_.for_tiles(group, [&](int64_t tile, int64_t image, int64_t ty, int64_t tx) {
            const float* pixels[kOutPixels];
            std::fill_n(pixels, kOutPixels, outside_.data());
            g_.for_outputs(y, image, ty, tx, [&](int at, const float* pixel) { pixels[at] = pixel; });
            for (int64_t c = 0; c < g_.out_channels; c += kLanes) {
                float* to = planes.at(0, tile, c);
                V elements[kOutPixels], transformed[kPoints];
                for (int p = 0; p < kOutPixels; ++p) elements[p] = read<V>(pixels[p] + c);
                sandwich<kOutputAdjoint, kIn, kOut>(transformed, elements);
                for (int p = 0; p < kPoints; ++p) write(to + p * planes.plane, transformed[p]);
            }
        });
    }

    void forward(const View<const float>& x, const View<const float>& w, const float* bias,
                 const View<float>& y) const {
        const Planes kernel = transform_kernel_transposed(w);
        at::parallel_for(0, g_.num_groups(), 1, [&](int64_t begin, int64_t end) {
            const Planes in = g_.input_planes(), out = g_.output_planes(Layout::kRows);
            for (int64_t group = begin; group < end; ++group) {
                transform_inputs(x, group, in);
                const Product size{g_.tiles_in(group), g_.inner, g_.out_channels, false};
                for (int p = 0; p < kPoints; ++p)
                    multiply(size, in.at(p), in.row, 1, kernel.panels(p), out.at(p), out.row);
                transform_outputs(out, group, bias, y);
            }
        });
    }

    // x holds zeros.
    void input_gradient(const View<const float>& y, const View<const float>& w, const View<float>& x) const {
        const Planes kernel = transform_kernel(w);
        at::parallel_for(0, g_.num_groups(), 1, [&](int64_t begin, int64_t end) {
            const Planes in = g_.input_planes(), out = g_.output_planes(Layout::kRows);
            for (int64_t group = begin; group < end; ++group) {
                gather_outputs(y, group, out);
                const Product size{g_.tiles_in(group), g_.out_channels, g_.inner, false};
                for (int p = 0; p < kPoints; ++p)
                    multiply(size, out.at(p), out.row, 1, kernel.panels(p), in.at(p), in.row);
                scatter_inputs(in, group, x);
            }
        });
    }

    void kernel_gradient(const View<const float>& x, const View<const float>& y, const View<float>& w) const {
        const int64_t chunks = std::clamp<int64_t>(g_.num_groups(), 1, at::get_num_threads());
        const std::vector<Planes> sums = make_sums(chunks);
        at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
            const Planes in = g_.input_planes(), out = g_.output_planes(Layout::kPanels);
            for (int64_t chunk = first; chunk < last; ++chunk) {
                const int64_t end = g_.num_groups() * (chunk + 1) / chunks;
                for (int64_t group = g_.num_groups() * chunk / chunks; group < end; ++group) {
                    transform_inputs(x, group, in);
                    gather_outputs(y, group, out);
                    const Product size{g_.inner, g_.tiles_in(group), g_.out_channels, true};
                    const Planes& sum = sums[chunk];
                    for (int p = 0; p < kPoints; ++p)
                        multiply(size, in.at(p), 1, in.row, out.panels(p), sum.at(p), sum.row);
                }
            }
        });
        for (int64_t chunk = 1; chunk < chunks; ++chunk) sums[0].memory.add_(sums[chunk].memory);
        store_kernel(sums[0], w);
    }

  private:
    // Zeros, for each thread its own.
    std::vector<Planes> make_sums(int64_t count) const {
        std::vector<Planes> sums;
        for (int64_t i = 0; i < count; ++i) {
            sums.emplace_back(g_.inner, g_.out_channels, Layout::kRows);
            sums.back().memory.zero_();
        }
        return sums;
    }

    // f(output channel, phase, first of eight input channels) for every `step`-th output channel.
    template <typename F> void for_kernels(int64_t step, const F& f) const {
        at::parallel_for(0, g_.out_channels / step, kLanes / step, [&](int64_t begin, int64_t end) {
            for (int64_t o = begin * step; o < end * step; o += step)
                for (int64_t phase = 0; phase < kPhases; ++phase)
                    for (int64_t channel = 0; channel < g_.channels; channel += kLanes) f(o, phase, channel);
        });
    }
    template <typename T>
    T* tap_of(const View<T>& w, int t, int64_t o, int64_t phase, int64_t channel) const {
        return w.data + o * w.stride[0] + channel * w.stride[1] +
               (t / kTaps * kStride + phase / kStride) * w.stride[2] +
               (t % kTaps * kStride + phase % kStride) * w.stride[3];
    }
    void transform_taps(V (&to)[kPoints], const View<const float>& w, int64_t o, int64_t phase,
                        int64_t channel) const {
        V taps[kKernelTaps];
        for (int t = 0; t < kKernelTaps; ++t) {
            const float* from = tap_of(w, t, o, phase, channel);
            if (w.stride[1] == 1)
                taps[t] = read<V>(from);
            else
                for (int c = 0; c < kLanes; ++c) taps[t][c] = from[c * w.stride[1]];
        }
        sandwich<kKernel, kIn, kTaps>(to, taps);
    }

    const Geometry& g_;
    std::vector<float> outside_;  // a pixel beyond the border
};

void check(const Tensor& x, at::IntArrayRef w) {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "images of ", x.scalar_type(), ": need float32");
    TORCH_CHECK(w[2] == kStride * kTaps && w[3] == kStride * kTaps, "kernels must be 4x4");
    TORCH_CHECK(w[0] % kBlockColumns == 0 && w[1] % kBlockColumns == 0, "channels must be multiples of ",
                kBlockColumns);
}

constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

// See halving_conv.py for what the operators compute.
Tensor halving_conv(const Tensor& images, const Tensor& w, const std::optional<Tensor>& b, int64_t padding) {
    check(images, w.sizes());
    const Tensor x = images.contiguous(kFormat);
    const auto out_size = [&](int64_t size) { return (size + 2 * padding - kStride * kTaps) / kStride + 1; };
    const std::vector<int64_t> size = {x.size(0), w.size(0), out_size(x.size(2)), out_size(x.size(3))};
    Tensor y = at::empty(size, x.options(), kFormat);
    const std::optional<Tensor> bias = b.has_value() ? std::optional(b->contiguous()) : b;
    const Geometry geometry(x.sizes(), w.sizes(), y.sizes(), padding);
    Convolution(geometry).forward(View<const float>(x), View<const float>(w),
                                  bias ? bias->const_data_ptr<float>() : nullptr, View<float>(y));
    return y;
}

Tensor input_gradient(const Tensor& gradient, const Tensor& w, at::IntArrayRef size, int64_t padding) {
    check(gradient, w.sizes());
    const Tensor y = gradient.contiguous(kFormat);
    Tensor x = at::empty({y.size(0), w.size(1), size[0], size[1]}, y.options(), kFormat).zero_();
    const Geometry geometry(x.sizes(), w.sizes(), y.sizes(), padding);
    Convolution(geometry).input_gradient(View<const float>(y), View<const float>(w), View<float>(x));
    return x;
}

Tensor kernel_gradient(const Tensor& images, const Tensor& gradient, const Tensor& like, int64_t padding) {
    check(images, like.sizes());
    const Tensor x = images.contiguous(kFormat), y = gradient.contiguous(kFormat);
    Tensor w = at::empty_like(like);
    const Geometry geometry(x.sizes(), w.sizes(), y.sizes(), padding);
    Convolution(geometry).kernel_gradient(View<const float>(x), View<const float>(y), View<float>(w));
    return w;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(stylesan_cpu, m) {
    m.def("halving_conv(Tensor x, Tensor w, Tensor? b, int padding) -> Tensor");
    m.def("halving_conv_input_gradient(Tensor gradient, Tensor w, SymInt[2] size, int padding) -> Tensor");
    m.def("halving_conv_kernel_gradient(Tensor x, Tensor gradient, Tensor like, int padding) -> Tensor");
}

TORCH_LIBRARY_IMPL(stylesan_cpu, CPU, m) {
    m.impl("halving_conv", halving_conv);
    m.impl("halving_conv_input_gradient", input_gradient);
    m.impl("halving_conv_kernel_gradient", kernel_gradient);
}
