// SPDX-License-Identifier: MIT
// Filtered leaky ReLU on a CPU: up-sample, bend, down-sample, without an up-sampled image in memory.
//
// Eight feature maps at a time, one per lane of a vector (lanes.h), row by row of the up-sampled grid:
//
//     rows of the input -> weighted sum (up-sampling along y) -> UpRow (along x) and the pointwise function
//     -> DownRow (along x) -> a ring of recent rows -> weighted sum (down-sampling along y) -> output row
//
// All of it stays in the first two levels of cache. Only filter taps that meet a sample are multiplied.
// Derivatives of every order are the same chain with the filters exchanged and with recorded bits for the
// activation: two bits per up-sampled value say whether it was positive and whether it was clamped. A filter
// that is not separable is treated as a sum of few separable ones.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "axis.h"
#include "rows.h"

namespace {

using at::Tensor;

constexpr int64_t kTileColumns = 256;  // wider images are cut, so that the rows at work fit the cache
constexpr int64_t kMinTileRows = 16;   // shorter tiles would repeat too much of their neighbours' work
constexpr int kTasksPerThread = 4;     // fewer leave threads without work at the end

// A filter as a sum of separable ones: term r is the outer product of columns y[r] and rows x[r].
struct Filter {
    int64_t taps_y = 1, taps_x = 1, rank = 1;
    std::vector<double> y, x;
};

// Cross approximation: subtract the column and row through the largest entry until nothing is left. The
// low-pass filters that matter have rank 2 to 5 in float32, half as many terms as any factorisation by
// symmetry alone.
Filter decompose(std::vector<double> f, int64_t height, int64_t width, double tolerance) {
    Filter filter{height, width, 0, {}, {}};
    const auto magnitude = [](double a, double b) { return std::abs(a) < std::abs(b); };
    const double largest = std::abs(*std::max_element(f.begin(), f.end(), magnitude));
    for (int64_t max_rank = std::min(height, width); filter.rank < max_rank; ++filter.rank) {
        const int64_t at = std::max_element(f.begin(), f.end(), magnitude) - f.begin();
        const double pivot = f[at];
        if (filter.rank > 0 && std::abs(pivot) <= tolerance * largest) break;
        const int64_t row = at / width, column = at % width;
        for (int64_t i = 0; i < height; ++i) filter.y.push_back(f[i * width + column]);
        for (int64_t j = 0; j < width; ++j) filter.x.push_back(pivot == 0 ? 0 : f[row * width + j] / pivot);
        const double* y = &filter.y[filter.rank * height];
        const double* x = &filter.x[filter.rank * width];
        for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; ++j) f[i * width + j] -= y[i] * x[j];
    }
    return filter;
}

// The filter that correlating needs, times `gain`; `f` may be absent, (taps,) or (taps_y, taps_x).
Filter read_filter(const std::optional<Tensor>& f, bool flip, double gain, double tolerance) {
    if (!f.has_value()) return {1, 1, 1, {1.0}, {gain}};
    const Tensor values = f->to(at::kDouble).contiguous();
    std::vector<double> taps(values.const_data_ptr<double>(),
                             values.const_data_ptr<double>() + values.numel());
    if (!flip) std::reverse(taps.begin(), taps.end());
    if (f->dim() == 1) {
        const auto count = static_cast<int64_t>(taps.size());
        std::vector<double> scaled = taps;
        for (double& tap : scaled) tap *= gain;
        return {count, count, 1, std::move(taps), std::move(scaled)};
    }
    Filter filter = decompose(std::move(taps), f->size(0), f->size(1), tolerance);
    for (double& tap : filter.x) tap *= gain;
    return filter;
}

enum class Pointwise { activate, record, replay };

// What happens to up-sampled values, with or without a record of it; or again what once happened to them.
// bits[i]: the low byte says in which lanes value i was positive, the high byte in which it was clamped.
template <Pointwise kPointwise, typename T>
void bend(Lanes<T>* values, int16_t* bits, int64_t count, double slope_, std::optional<double> limit_) {
    using V = Lanes<T>;
    const V slope = V{} + T(slope_);
    const V limit = V{} + T(limit_.value_or(std::numeric_limits<double>::infinity()));
    for (int64_t i = 0; i < count; ++i) {
        V v = values[i];
        if constexpr (kPointwise == Pointwise::replay) {
            v = lanes_of<V>(bits[i]) ? v : v * slope;
            if (bits[i] >> 8 != 0) v = lanes_of<V>(bits[i] >> 8) ? V{} : v;  // rare
        } else {
            const auto is_positive = v > 0;
            v = is_positive ? v : v * slope;
            if constexpr (kPointwise == Pointwise::record)
                bits[i] = static_cast<int16_t>(bits_of(is_positive) | bits_of((v < 0 ? -v : v) > limit) << 8);
            v = v > limit ? limit : v;  // NaN stays NaN
            v = v < -limit ? -limit : v;
        }
        values[i] = v;
    }
}

// Everything about one call but the tensors' element type.
struct Chain {
    Axis y, x;
    Filter up, down;
    double slope;
    std::optional<double> limit;  // bound on the magnitude between the filters
    int64_t num_images, num_channels;
    Layout in, out;
    int64_t num_blocks() const { return ceil_div(num_channels, kLanes); }  // of maps per image
};

// Computes rectangles of the output, eight maps at a time. S is what tensors hold, T what is computed with.
template <typename S, typename T, Pointwise kPointwise> class Worker {
    using V = Lanes<T>;

  public:
    Worker(const Chain& chain, const S* x, const S* bias, int16_t* mask, S* out)
        : chain_(chain),
          x_(x),
          bias_(bias),
          mask_(mask),
          out_(out),
          up_row_(chain.x.up, chain.up.taps_x, chain.up.rank, chain.up.x),
          down_row_(chain.x.down, chain.down.taps_x, chain.down.rank, chain.down.x),
          up_y_(chain.up.y.begin(), chain.up.y.end()),
          down_y_(chain.down.y.begin(), chain.down.y.end()) {}

    void run(int64_t image, int64_t block, const Span& ys, const Span& xs) {
        begin(image, block, xs);
        const Axis& axis = chain_.y;
        const int64_t width = xs.out_end - xs.out_begin, ring = axis.down_taps;
        int64_t next_mid = ys.mid_begin;
        next_in_ = 0;
        for (int64_t o = ys.out_begin; o < ys.out_end; ++o) {
            const int64_t window = axis.first_mid(o);
            const int64_t begin = std::max<int64_t>(window, 0),
                          end = std::min(window + axis.down_taps, axis.mid);
            for (int64_t m = std::max(next_mid, begin); m < end; ++m)
                make_mid_row(m, xs, m >= ys.own_begin && m < ys.own_end);
            next_mid = std::max(next_mid, end);
            int64_t count = 0;
            for (int64_t r = 0; r < chain_.down.rank; ++r)
                count += list_rows(count, ring_ + r * ring * width, width, ring, begin, end,
                                   &down_y_[r * axis.down_taps + begin - window], 1);
            weighted_sum(out_row_, rows_.data(), weights_.data(), count, width);
            S* to = out_ + image * chain_.out.image + block * kLanes * chain_.out.channel +
                    o * chain_.out.row + xs.out_begin * chain_.out.column;
            store_pixels(to, out_row_, chain_.out.channel, chain_.out.column, num_maps_, width);
        }
    }

  private:
    // Divides the thread's scratch memory and zeroes what is read without being written.
    void begin(int64_t image, int64_t block, const Span& xs) {
        thread_local Scratch scratch;
        const Axis &x = chain_.x, &y = chain_.y;
        const int64_t width = xs.out_end - xs.out_begin;
        const int64_t mid_end = std::max(xs.window_end, xs.group_mid + xs.num_groups * x.up);
        mid_size_ = mid_end - xs.mid_origin();
        in_size_ = xs.in_end - xs.in_begin;
        up_size_ = std::max<int64_t>(xs.num_groups + x.num_steps() - 1, 0);
        const int64_t sizes[] = {y.num_steps() * in_size_, chain_.up.rank * up_size_, mid_size_,
                                 chain_.down.rank * y.down_taps * width, width};
        V** const parts[] = {&in_rows_, &up_rows_, &mid_row_, &ring_, &out_row_};
        int64_t total = 0;
        for (int64_t size : sizes) total += size;
        V* memory = reinterpret_cast<V*>(scratch.reserve(total * sizeof(V) + mid_size_ * sizeof(int16_t)));
        for (int i = 0; i < 5; memory += sizes[i++]) *parts[i] = memory;
        bits_ = reinterpret_cast<int16_t*>(memory);
        std::fill(up_rows_, up_rows_ + chain_.up.rank * up_size_, V{});
        std::fill(mid_row_, mid_row_ + mid_size_, V{});
        const int64_t most = std::max(y.num_steps(), chain_.down.rank * y.down_taps);
        rows_.resize(most);
        weights_.resize(most);

        block_ = image * chain_.num_blocks() + block;
        num_maps_ = static_cast<int>(std::min<int64_t>(chain_.num_channels - block * kLanes, kLanes));
        in_ = x_ + image * chain_.in.image + block * kLanes * chain_.in.channel +
              xs.in_begin * chain_.in.column;
        block_bias_ = V{};
        for (int lane = 0; bias_ != nullptr && lane < num_maps_; ++lane)
            block_bias_[lane] = T(bias_[block * kLanes + lane]);
    }

    // Arguments of weighted_sum for rows begin..end of a ring of `size` rows, from `at` on. Returns how many.
    int64_t list_rows(int64_t at, const V* ring, int64_t row_size, int64_t size, int64_t begin, int64_t end,
                      const T* weights, int64_t weight_step) {
        int64_t slot = begin % size;
        for (int64_t i = begin; i < end; ++i, ++at) {
            rows_[at] = ring + slot * row_size;
            weights_[at] = weights[(i - begin) * weight_step];
            slot = slot + 1 == size ? 0 : slot + 1;
        }
        return end - begin;
    }

    // Row m of the up-sampled image, activated and down-sampled along x, into the ring.
    void make_mid_row(int64_t m, const Span& xs, bool is_own) {
        const Axis& y = chain_.y;
        const int64_t steps = y.num_steps(), first = y.first_input(m);
        const int64_t begin = std::max<int64_t>(first, 0),
                      end = std::min(first + ceil_div(y.up_taps - y.first_tap(m), y.up), y.in);
        for (int64_t i = std::max(next_in_, begin); i < end; ++i) {
            V* row = in_rows_ + i % steps * in_size_;
            load_pixels(row, in_ + i * chain_.in.row, chain_.in.channel, chain_.in.column, num_maps_,
                        in_size_, block_bias_);
        }
        next_in_ = std::max(next_in_, end);
        for (int64_t r = 0; r < chain_.up.rank; ++r) {
            const T* weights = &up_y_[r * y.up_taps + y.first_tap(m) + (begin - first) * y.up];
            const int64_t count = list_rows(0, in_rows_, in_size_, steps, begin, end, weights, y.up);
            weighted_sum(up_rows_ + r * up_size_ + xs.in_begin - xs.group, rows_.data(), weights_.data(),
                         count, in_size_);
        }
        make_up_row(m, xs, is_own);
        const int64_t width = xs.out_end - xs.out_begin;
        down_row_.run(ring_ + m % y.down_taps * width, y.down_taps * width,
                      mid_row_ + xs.window - xs.mid_origin(), width);
    }

    // Up-samples row m along x, within the image only, and applies the pointwise function.
    void make_up_row(int64_t m, const Span& xs, bool is_own) {
        V* const groups = mid_row_ + xs.group_mid - xs.mid_origin();
        up_row_.run(groups, up_rows_, up_size_, xs.num_groups);
        V* const begin = groups + (xs.mid_begin - xs.group_mid);
        const int64_t count = xs.mid_end - xs.mid_begin;
        std::fill(groups, begin, V{});
        std::fill(begin + count, groups + xs.num_groups * chain_.x.up, V{});
        const int64_t place = (block_ * chain_.y.mid + m) * chain_.x.mid + xs.mid_begin;
        int16_t* const bits = mask_ == nullptr ? nullptr : mask_ + place;
        // Neighbouring tiles, maybe of other threads, compute some values twice; one of them writes the bits.
        int16_t* const row_bits = kPointwise == Pointwise::record ? bits_ : bits;
        bend<kPointwise, T>(begin, row_bits, count, chain_.slope, chain_.limit);
        const int64_t own = xs.own_begin - xs.mid_begin;
        if (kPointwise == Pointwise::record && is_own)
            std::copy_n(bits_ + own, xs.own_end - xs.own_begin, bits + own);
    }

    const Chain& chain_;
    const S *x_, *bias_;
    int16_t* mask_;
    S* out_;
    UpRow<T> up_row_;
    DownRow<T> down_row_;
    std::vector<T> up_y_, down_y_;  // taps along y, those of one term after the other
    std::vector<const V*> rows_;    // arguments of weighted_sum
    std::vector<T> weights_;
    V *in_rows_, *up_rows_, *mid_row_, *ring_, *out_row_, block_bias_;
    int16_t* bits_;  // of the current mid row
    const S* in_;    // the block's first map
    int64_t mid_size_, in_size_, up_size_, next_in_, block_;
    int num_maps_;
};

Layout layout_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

template <typename S, typename T, Pointwise kPointwise>
void run_tiles(const Chain& chain, const S* x, const S* bias, int16_t* mask, S* out) {
    const int64_t num_blocks = chain.num_images * chain.num_blocks();
    const int64_t columns = ceil_div(chain.x.out, kTileColumns);
    const int64_t wanted = at::get_num_threads() > 1 ? at::get_num_threads() * kTasksPerThread : 1;
    const int64_t strips =
        std::clamp<int64_t>(ceil_div(wanted, num_blocks * columns), 1, ceil_div(chain.y.out, kMinTileRows));
    const int64_t tiles = columns * strips;
    at::parallel_for(0, num_blocks * tiles, 1, [&](int64_t begin, int64_t end) {
        Worker<S, T, kPointwise> worker(chain, x, bias, mask, out);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t block = task / tiles, strip = task % tiles / columns, column = task % columns;
            const Span ys(chain.y, chain.y.out * strip / strips, chain.y.out * (strip + 1) / strips);
            const Span xs(chain.x, chain.x.out * column / columns, chain.x.out * (column + 1) / columns);
            worker.run(block / chain.num_blocks(), block % chain.num_blocks(), ys, xs);
        }
    });
}

template <Pointwise kPointwise>
void run_chain(const Chain& chain, const Tensor& x, const std::optional<Tensor>& bias, Tensor* mask,
               Tensor& out) {
    if (out.numel() == 0) return;
    const auto run = [&](auto stored, auto computed) {
        using S = decltype(stored);
        const S* bias_data = bias.has_value() ? bias->const_data_ptr<S>() : nullptr;
        int16_t* mask_data = mask == nullptr ? nullptr : mask->data_ptr<int16_t>();
        run_tiles<S, decltype(computed), kPointwise>(chain, x.const_data_ptr<S>(), bias_data, mask_data,
                                                     out.mutable_data_ptr<S>());
    };
    switch (x.scalar_type()) {
        case at::kFloat: return run(float{}, float{});
        case at::kDouble: return run(double{}, double{});
        case at::kBFloat16: return run(c10::BFloat16{}, float{});
        default: TORCH_CHECK(false, "images of ", x.scalar_type(), ": need float32, float64 or bfloat16");
    }
}

// Of a filter's largest tap: what is smaller drowns in the rounding of the sums that it enters.
double tolerance_for(const Tensor& x) {
    return 4 * (x.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                               : std::numeric_limits<float>::epsilon());
}

Axis make_axis(int64_t in, int64_t up, int64_t up_offset, int64_t up_taps, int64_t down, int64_t down_taps,
               int64_t after) {
    const int64_t padded = in * up + up_offset + after;
    TORCH_CHECK(padded >= up_taps && padded - up_taps + 1 >= down_taps, "an image axis of ", in,
                " pixels x up ", up, " + padding ", up_offset, " + ", after,
                " is smaller than the filters: increase the padding");
    const int64_t mid = padded - up_taps + 1;
    return {in, mid, (mid - down_taps) / down + 1, up, up_offset, up_taps, down, 0, down_taps};
}

// See filtered_lrelu_cpu.py for what the operators compute.
std::tuple<Tensor, Tensor> filtered_lrelu(const Tensor& images, const std::optional<Tensor>& b,
                                          const std::optional<Tensor>& fu, const std::optional<Tensor>& fd,
                                          int64_t up, int64_t down, at::IntArrayRef padding, double gain,
                                          double slope, std::optional<double> limit, bool flip_filter,
                                          bool keep_mask) {
    const auto format = images.suggest_memory_format();
    const Tensor x = images.contiguous(format);
    Chain chain{};
    chain.up = read_filter(fu, flip_filter, static_cast<double>(up * up), tolerance_for(x));
    chain.down = read_filter(fd, flip_filter, gain, tolerance_for(x));
    chain.x = make_axis(x.size(3), up, padding[0], chain.up.taps_x, down, chain.down.taps_x, padding[1]);
    chain.y = make_axis(x.size(2), up, padding[2], chain.up.taps_y, down, chain.down.taps_y, padding[3]);
    chain.slope = slope;
    chain.limit = limit;
    chain.num_images = x.size(0);
    chain.num_channels = x.size(1);
    Tensor out = at::empty({x.size(0), x.size(1), chain.y.out, chain.x.out}, x.options(), format);
    chain.in = layout_of(x);
    chain.out = layout_of(out);
    const std::optional<Tensor> bias = b.has_value() ? std::optional(b->to(x.scalar_type()).contiguous()) : b;
    const auto bits = x.options().dtype(at::kShort);
    if (!keep_mask) {
        run_chain<Pointwise::activate>(chain, x, bias, nullptr, out);
        return {out, at::empty({0}, bits)};
    }
    // Values that no output depends on are never looked at; their bits must be something all the same.
    const std::vector<int64_t> size = {x.size(0), chain.num_blocks(), chain.y.mid, chain.x.mid};
    const bool is_covered = chain.x.uses_all_mid() && chain.y.uses_all_mid() && out.numel() > 0;
    Tensor mask = is_covered ? at::empty(size, bits) : at::zeros(size, bits);
    run_chain<Pointwise::record>(chain, x, bias, &mask, out);
    return {out, mask};
}

Tensor masked_resampling(const Tensor& images, const Tensor& mask, const std::optional<Tensor>& fu,
                         const std::optional<Tensor>& fd, int64_t up, int64_t down, at::IntArrayRef up_offset,
                         at::IntArrayRef down_offset, at::IntArrayRef out_size, double gain, double slope,
                         bool flip_filter) {
    const auto format = images.suggest_memory_format();
    const Tensor x = images.contiguous(format);
    Tensor bits = mask.contiguous();
    Chain chain{};
    chain.up = read_filter(fu, flip_filter, 1, tolerance_for(x));
    chain.down = read_filter(fd, flip_filter, gain, tolerance_for(x));
    chain.x = {x.size(3), bits.size(3),   out_size[1],      up, up_offset[0], chain.up.taps_x,
               down,      down_offset[0], chain.down.taps_x};
    chain.y = {x.size(2), bits.size(2),   out_size[0],      up, up_offset[1], chain.up.taps_y,
               down,      down_offset[1], chain.down.taps_y};
    chain.slope = slope;
    chain.num_images = x.size(0);
    chain.num_channels = x.size(1);
    TORCH_CHECK(bits.size(0) == chain.num_images && bits.size(1) == chain.num_blocks(),
                "the mask is of other images");
    Tensor out = at::empty({x.size(0), x.size(1), out_size[0], out_size[1]}, x.options(), format);
    chain.in = layout_of(x);
    chain.out = layout_of(out);
    run_chain<Pointwise::replay>(chain, x, std::nullopt, &bits, out);
    return out;
}

}  // namespace

TORCH_LIBRARY(stylesan_cpu, m) {
    m.def(
        "filtered_lrelu(Tensor x, Tensor? b, Tensor? fu, Tensor? fd, int up, int down, int[4] padding, float "
        "gain, "
        "float slope, float? limit, bool flip_filter, bool keep_mask) -> (Tensor, Tensor)");
    m.def(
        "masked_resampling(Tensor x, Tensor mask, Tensor? fu, Tensor? fd, int up, int down, SymInt[2] "
        "up_offset, "
        "SymInt[2] down_offset, SymInt[2] out_size, float gain, float slope, bool flip_filter) -> Tensor");
}

TORCH_LIBRARY_IMPL(stylesan_cpu, CPU, m) {
    m.impl("filtered_lrelu", filtered_lrelu);
    m.impl("masked_resampling", masked_resampling);
}
