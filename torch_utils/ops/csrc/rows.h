// SPDX-License-Identifier: MIT
// Filtering of rows whose pixels are vectors (lanes.h): the three inner loops of filtered_lrelu.cpp.
//
// Kernels are unrolled for the filters of StyleGAN3, six taps per sample of the slower rate, which are
// symmetric: values at the same distance from the centre are added before they meet their tap, and that
// halves the products (additions run beside them). Any other filter takes the plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "lanes.h"

// out = sum_i weights[i] * rows[i], from vector `i` on in blocks. Returns where it stopped.
template <int kBlock, typename T, typename V>
inline int64_t weighted_blocks(V* out, const V* const* rows, const T* weights, int64_t count, int64_t i,
                               int64_t width) {
    for (; i + kBlock <= width; i += kBlock) {
        V sums[kBlock] = {};
        for (int64_t k = 0; k < count; ++k)
            for (int j = 0; j < kBlock; ++j) sums[j] += weights[k] * rows[k][i + j];
        for (int j = 0; j < kBlock; ++j) out[i + j] = sums[j];
    }
    return i;
}

// out = sum_i weights[i] * rows[i], `width` vectors.
template <typename T, typename V>
void weighted_sum(V* out, const V* const* rows, const T* weights, int64_t count, int64_t width) {
    int64_t i = weighted_blocks<8>(out, rows, weights, count, 0, width);
    i = weighted_blocks<4>(out, rows, weights, count, i, width);
    weighted_blocks<1>(out, rows, weights, count, i, width);
}

// Up-sampling along a row: `rank` input rows, `row_size` apart, each with its taps, are added up.
// out[g * up + p] = sum_{r, k} weights[(r * steps + k) * up + p] * rows[r * row_size + g + k].
template <typename T> struct UpRow {
    int64_t up = 1, steps = 1, rank = 1;
    std::vector<T> weights;
    // For symmetric taps: of the phases p and up - 1 - p, half the sum and half the difference of the weights
    // of steps k and steps - 1 - k; empty otherwise.
    std::vector<T> even, odd;

    UpRow(int64_t up, int64_t taps, int64_t rank, const std::vector<double>& x)
        : up(up), steps((taps + up - 1) / up), rank(rank), weights(rank * steps * up) {
        for (int64_t r = 0; r < rank; ++r)
            for (int64_t t = 0; t < taps; ++t)  // the first output of a group meets the last phase
                weights[(r * steps + t / up) * up + up - 1 - t % up] = T(x[r * taps + t]);
        if (up % 2 != 0 || steps % 2 != 0 || taps != steps * up || !is_symmetric(x, rank, taps)) return;
        for (int64_t r = 0; r < rank; ++r) {
            for (int64_t k = 0; k < steps / 2; ++k) {
                for (int64_t p = 0; p < up / 2; ++p) {
                    const double a = x[r * taps + k * up + up - 1 - p], b = x[r * taps + k * up + p];
                    even.push_back(T((a + b) / 2));
                    odd.push_back(T((a - b) / 2));
                }
            }
        }
    }

    template <typename V> void run(V* out, const V* rows, int64_t row_size, int64_t num_groups) const {
        if constexpr (std::is_same_v<T, float>) {  // float64 is for tests: not worth the compiler's time
            if (steps == 6 && !even.empty() && num_groups >= 4) {
                if (up == 2) return run_symmetric<2, 6, 4>(out, rows, row_size, num_groups);
                if (up == 4) return run_symmetric<4, 6, 2>(out, rows, row_size, num_groups);
            }
        }
        for (int64_t i = 0; i < num_groups * up; ++i) {
            V sum = {};
            for (int64_t r = 0; r < rank; ++r)
                for (int64_t k = 0; k < steps; ++k)
                    sum += weights[(r * steps + k) * up + i % up] * rows[r * row_size + i / up + k];
            out[i] = sum;
        }
    }

    template <int kUp, int kSteps, int kBlock, typename V>
    void run_symmetric(V* out, const V* rows, int64_t row_size, int64_t num_groups) const {
        constexpr int kPairs = kUp / 2, kHalf = kSteps / 2;
        for (int64_t next = 0; next < num_groups; next += kBlock) {
            const int64_t g = std::min(next, num_groups - kBlock);  // the last ones overlap
            V evens[kBlock][kPairs] = {}, odds[kBlock][kPairs] = {};
            for (int64_t r = 0; r < rank; ++r) {
                const V* row = rows + r * row_size + g;
#pragma GCC unroll 8
                for (int k = 0; k < kHalf; ++k) {
                    for (int j = 0; j < kBlock; ++j) {
                        const V a = row[j + k], b = row[j + kSteps - 1 - k];
                        const V sum = a + b, difference = a - b;
                        for (int p = 0; p < kPairs; ++p) {
                            evens[j][p] += even[(r * kHalf + k) * kPairs + p] * sum;
                            odds[j][p] += odd[(r * kHalf + k) * kPairs + p] * difference;
                        }
                    }
                }
            }
            for (int j = 0; j < kBlock; ++j) {
                for (int p = 0; p < kPairs; ++p) {
                    V* group = out + (g + j) * kUp;
                    group[p] = evens[j][p] + odds[j][p];
                    group[kUp - 1 - p] = evens[j][p] - odds[j][p];
                }
            }
        }
    }

    // Up to rounding: then either of two mirrored taps will do.
    static bool is_symmetric(const std::vector<double>& x, int64_t rank, int64_t taps) {
        for (int64_t r = 0; r < rank; ++r) {
            double largest = 0, worst = 0;
            for (int64_t t = 0; t < taps; ++t) {
                const double a = x[r * taps + t], b = x[r * taps + taps - 1 - t];
                largest = std::max(largest, std::abs(a));
                worst = std::max(worst, std::abs(a - b));
            }
            if (worst > std::numeric_limits<T>::epsilon() * largest) return false;
        }
        return true;
    }
};

// Down-sampling along a row, once with each of `rank` sets of taps:
// out[r * out_step + o] = sum_t weights[r * taps + t] * row[o * down + t].
template <typename T> struct DownRow {
    int64_t down = 1, taps = 1, rank = 1;
    std::vector<T> weights;
    bool is_symmetric = false;

    DownRow(int64_t down, int64_t taps, int64_t rank, const std::vector<double>& x)
        : down(down),
          taps(taps),
          rank(rank),
          weights(x.begin(), x.end()),
          is_symmetric(taps % 2 == 0 && UpRow<T>::is_symmetric(x, rank, taps)) {}

    template <typename V> void run(V* out, int64_t out_step, const V* row, int64_t width) const {
        if constexpr (std::is_same_v<T, float>) {
            if (is_symmetric && width >= 2) {
                if (down == 2 && taps == 12) return run_symmetric<2, 12, 2>(out, out_step, row, width);
                if (down == 4 && taps == 24) return run_symmetric<4, 24, 1>(out, out_step, row, width);
            }
        }
        for (int64_t r = 0; r < rank; ++r) {
            for (int64_t o = 0; o < width; ++o) {
                V sum = {};
                for (int64_t t = 0; t < taps; ++t) sum += weights[r * taps + t] * row[o * down + t];
                out[r * out_step + o] = sum;
            }
        }
    }

    template <int kDown, int kTaps, int kBlock, typename V>
    void run_symmetric(V* out, int64_t out_step, const V* row, int64_t width) const {
        for (int64_t next = 0; next < width; next += kBlock) {
            const int64_t o = std::min(next, width - kBlock);
            V pairs[kBlock][kTaps / 2];
#pragma GCC unroll 16
            for (int t = 0; t < kTaps / 2; ++t)
                for (int j = 0; j < kBlock; ++j)
                    pairs[j][t] = row[(o + j) * kDown + t] + row[(o + j) * kDown + kTaps - 1 - t];
            for (int64_t r = 0; r < rank; ++r) {
                V sums[kBlock] = {};
#pragma GCC unroll 16
                for (int t = 0; t < kTaps / 2; ++t)
                    for (int j = 0; j < kBlock; ++j) sums[j] += weights[r * kTaps + t] * pairs[j][t];
                for (int j = 0; j < kBlock; ++j) out[r * out_step + o + j] = sums[j];
            }
        }
    }
};
