// SPDX-License-Identifier: MIT
// Convolution with 4x4 kernels of stride 2 in 9/16 of the multiplications (Winograd; Lavin and Gray,
// arXiv:1509.09308), and its gradients. It has a 2x2 kernel on the input's four phases, taken as channels.
//
// A 2x2 tile of the output depends on 3x3 pixels of each phase. With constant matrices B, G, A of 0, 1 and -1
//
//     output tile = A^T [(G w G^T) * (B^T input B)] A,  * element by element, summed over channels and phases
//
// so that for each of the nine elements all tiles and channels together are one matrix product. The gradients
// are the adjoint of each factor. What comes out for an image does not depend on the others: sums run over
// channels in their order.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "halving_transforms.h"

namespace halving {
namespace {

using at::Tensor;

class Convolution : public Transforms {
  public:
    using Transforms::Transforms;

    // A group of images at a time, with the whole kernel transformed before.

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
                transform_outputs(out, g_.out_channels, group, bias, y);
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
                const int64_t begin = g_.num_groups() * chunk / chunks;
                const int64_t end = g_.num_groups() * (chunk + 1) / chunks;
                for (int64_t group = begin; group < end; ++group) {
                    transform_inputs(x, group, in);
                    gather_outputs(y, group, out);
                    const Product size{g_.inner, g_.tiles_in(group), g_.out_channels, group > begin};
                    const Planes& sum = sums[chunk];
                    for (int p = 0; p < kPoints; ++p)
                        multiply(size, in.at(p), 1, in.row, out.panels(p), sum.at(p), sum.row);
                }
            }
        });
        for (int64_t chunk = 1; chunk < chunks; ++chunk) sums[0].memory.add_(sums[chunk].memory);
        store_kernel(sums[0], w);
    }

    // The same three where kernels are large and tiles few: all images are transformed before, and 16 columns
    // of the kernel at a time, which stay in the cache. Moving whole transformed kernels takes longer than
    // everything else.

    void forward_by_panels(const View<const float>& x, const View<const float>& w, const float* bias,
                           const View<float>& y) const {
        const Planes in(g_.all_tiles(), g_.inner, Layout::kRows);
        for_groups([&](int64_t group, int64_t tile) { transform_inputs(x, group, in.below(tile)); });
        for_panels(g_.out_channels, g_.inner, [&](int64_t o, const Planes& kernel, const Planes& out) {
            for (int64_t column = 0; column < kBlockColumns; column += kLanes)
                for (int64_t phase = 0; phase < kPhases; ++phase)
                    for (int64_t channel = 0; channel < g_.channels; channel += kLanes)
                        transform_square(w, o + column, phase, channel, kernel, column);
            const Product size{g_.all_tiles(), g_.inner, kBlockColumns, false};
            for (int p = 0; p < kPoints; ++p)
                multiply(size, in.at(p), in.row, 1, kernel.panels(p), out.at(p), out.row);
            for (int64_t group = 0; group < g_.num_groups(); ++group)
                transform_outputs(out.below(group * g_.group_size()), kBlockColumns, group,
                                  bias ? bias + o : bias, y.from_channel(o));
        });
    }

    // x holds zeros.
    void input_gradient_by_panels(const View<const float>& y, const View<const float>& w,
                                  const View<float>& x) const {
        const Planes out(g_.all_tiles(), g_.out_channels, Layout::kRows);
        for_groups([&](int64_t group, int64_t tile) { gather_outputs(y, group, out.below(tile)); });
        for_panels(g_.inner, g_.out_channels, [&](int64_t first, const Planes& kernel, const Planes& in) {
            const int64_t phase = first / g_.channels, channel = first % g_.channels;
            for (int64_t o = 0; o < g_.out_channels; ++o)
                for (int64_t column = 0; column < kBlockColumns; column += kLanes)
                    transform_lanes(w, o, phase, channel + column, kernel, column);
            const Product size{g_.all_tiles(), g_.out_channels, kBlockColumns, false};
            for (int p = 0; p < kPoints; ++p)
                multiply(size, out.at(p), out.row, 1, kernel.panels(p), in.at(p), in.row);
            for (int64_t group = 0; group < g_.num_groups(); ++group)
                g_.for_tiles(group, [&](int64_t tile, int64_t image, int64_t ty, int64_t tx) {
                    scatter_tile(in, group * g_.group_size() + tile, 0, kBlockColumns,
                                 x.from_channel(channel), image, ty, tx, phase);
                });
        });
    }

    void kernel_gradient_by_panels(const View<const float>& x, const View<const float>& y,
                                   const View<float>& w) const {
        const Planes in(g_.all_tiles(), g_.inner, Layout::kRows);
        const Planes out(g_.all_tiles(), g_.out_channels, Layout::kPanels);
        for_groups([&](int64_t group, int64_t tile) {
            transform_inputs(x, group, in.below(tile));
            gather_outputs(y, group, out.below(tile));
        });
        at::parallel_for(0, g_.out_channels / kBlockColumns, 1, [&](int64_t begin, int64_t end) {
            const Planes sum(g_.channels, kBlockColumns, Layout::kPanels);
            for (int64_t o = begin * kBlockColumns; o < end * kBlockColumns; o += kBlockColumns)
                for (int64_t phase = 0; phase < kPhases; ++phase) {
                    const Product size{g_.channels, g_.all_tiles(), kBlockColumns, false};
                    for (int p = 0; p < kPoints; ++p)
                        multiply(size, in.at(p, 0, phase * g_.channels), 1, in.row, out.panels(p, o),
                                 sum.at(p), sum.row);
                    for (int64_t column = 0; column < kBlockColumns; column += kLanes)
                        for (int64_t channel = 0; channel < g_.channels; channel += kLanes)
                            store_square(sum, channel, column, w, o + column, phase, channel);
                }
        });
    }

  private:
    // Kernels to planes (out_channels, inner).
    Planes transform_kernel(const View<const float>& w) const {
        const Planes planes(g_.out_channels, g_.inner, Layout::kPanels);
        for_kernels(1, [&](int64_t o, int64_t phase, int64_t channel) {
            transform_lanes(w, o, phase, channel, planes, phase * g_.channels + channel);
        });
        return planes;
    }

    // Kernels to planes (inner, out_channels).
    Planes transform_kernel_transposed(const View<const float>& w) const {
        const Planes planes(g_.inner, g_.out_channels, Layout::kPanels);
        for_kernels(kLanes, [&](int64_t o, int64_t phase, int64_t channel) {
            transform_square(w, o, phase, channel, planes, o);
        });
        return planes;
    }

    // The adjoint: planes (inner, out_channels) to kernels.
    void store_kernel(const Planes& planes, const View<float>& w) const {
        for_kernels(kLanes, [&](int64_t o, int64_t phase, int64_t channel) {
            store_square(planes, phase * g_.channels + channel, o, w, o, phase, channel);
        });
    }

    // For each thread its own.
    std::vector<Planes> make_sums(int64_t count) const {
        std::vector<Planes> sums;
        for (int64_t i = 0; i < count; ++i) sums.emplace_back(g_.inner, g_.out_channels, Layout::kRows);
        return sums;
    }

    // f(group, its first tile)
    template <typename F> void for_groups(const F& f) const {
        at::parallel_for(0, g_.num_groups(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t group = begin; group < end; ++group) f(group, group * g_.group_size());
        });
    }
    // f(first of 16 columns, room for these columns of a kernel with `rows` rows, and for those of all tiles)
    template <typename F> void for_panels(int64_t columns, int64_t rows, const F& f) const {
        at::parallel_for(0, columns / kBlockColumns, 1, [&](int64_t begin, int64_t end) {
            const Planes kernel(rows, kBlockColumns, Layout::kPanels);
            const Planes tiles(g_.all_tiles(), kBlockColumns, Layout::kPanels);
            for (int64_t panel = begin; panel < end; ++panel) f(panel * kBlockColumns, kernel, tiles);
        });
    }

    // f(output channel, phase, first of eight input channels) for every `step`-th output channel.
    template <typename F> void for_kernels(int64_t step, const F& f) const {
        at::parallel_for(0, g_.out_channels / step, kLanes / step, [&](int64_t begin, int64_t end) {
            for (int64_t o = begin * step; o < end * step; o += step)
                for (int64_t phase = 0; phase < kPhases; ++phase)
                    for (int64_t channel = 0; channel < g_.channels; channel += kLanes) f(o, phase, channel);
        });
    }
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
    const Convolution convolution(geometry);
    const auto compute = geometry.has_few_tiles() ? &Convolution::forward_by_panels : &Convolution::forward;
    (convolution.*compute)(View<const float>(x), View<const float>(w),
                           bias ? bias->const_data_ptr<float>() : nullptr, View<float>(y));
    return y;
}

Tensor input_gradient(const Tensor& gradient, const Tensor& w, at::IntArrayRef size, int64_t padding) {
    check(gradient, w.sizes());
    const Tensor y = gradient.contiguous(kFormat);
    Tensor x = at::empty({y.size(0), w.size(1), size[0], size[1]}, y.options(), kFormat).zero_();
    const Geometry geometry(x.sizes(), w.sizes(), y.sizes(), padding);
    const Convolution convolution(geometry);
    const auto compute =
        geometry.has_few_tiles() ? &Convolution::input_gradient_by_panels : &Convolution::input_gradient;
    (convolution.*compute)(View<const float>(y), View<const float>(w), View<float>(x));
    return x;
}

Tensor kernel_gradient(const Tensor& images, const Tensor& gradient, const Tensor& like, int64_t padding) {
    check(images, like.sizes());
    const Tensor x = images.contiguous(kFormat), y = gradient.contiguous(kFormat);
    Tensor w = at::empty_like(like);
    const Geometry geometry(x.sizes(), w.sizes(), y.sizes(), padding);
    const Convolution convolution(geometry);
    const auto compute =
        geometry.has_few_tiles() ? &Convolution::kernel_gradient_by_panels : &Convolution::kernel_gradient;
    (convolution.*compute)(View<const float>(x), View<const float>(y), View<float>(w));
    return w;
}

}  // namespace
}  // namespace halving

TORCH_LIBRARY_FRAGMENT(stylesan_cpu, m) {
    m.def("halving_conv(Tensor x, Tensor w, Tensor? b, int padding) -> Tensor");
    m.def("halving_conv_input_gradient(Tensor gradient, Tensor w, SymInt[2] size, int padding) -> Tensor");
    m.def("halving_conv_kernel_gradient(Tensor x, Tensor gradient, Tensor like, int padding) -> Tensor");
}

TORCH_LIBRARY_IMPL(stylesan_cpu, CPU, m) {
    m.impl("halving_conv", halving::halving_conv);
    m.impl("halving_conv_input_gradient", halving::input_gradient);
    m.impl("halving_conv_kernel_gradient", halving::kernel_gradient);
}
