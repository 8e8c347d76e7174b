// SPDX-License-Identifier: MIT
// Which samples of an image axis depend on which: input -> up-sampled ("mid") -> output.
#pragma once

#include <algorithm>
#include <cstdint>

inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// One axis: mid[m] = sum_t a[t] in[(m - up_offset + t) / up], over the t for which that is whole;
// out[o] = sum_t b[t] mid[o * down - down_offset + t]. What lies outside counts as zero.
struct Axis {
    int64_t in, mid, out, up, up_offset, up_taps, down, down_offset, down_taps;

    int64_t num_steps() const { return ceil_div(up_taps, up); }  // inputs that one mid sample depends on
    int64_t first_input(int64_t m) const { return ceil_div(m - up_offset, up); }
    int64_t first_tap(int64_t m) const { return up * first_input(m) - (m - up_offset); }
    int64_t first_mid(int64_t o) const { return o * down - down_offset; }
    bool uses_all_mid() const {
        return down_offset >= 0 && down_taps >= down && first_mid(out - 1) + down_taps >= mid;
    }
};

// What a range of outputs of one axis needs.
struct Span {
    int64_t out_begin, out_end;
    int64_t window, window_end;  // mid samples under the filter, partly outside the image
    int64_t mid_begin, mid_end;  // the part inside
    int64_t own_begin, own_end;  // of these, the ones that no other span owns
    int64_t group, num_groups;   // `up` consecutive mid samples share their inputs, from `group` on
    int64_t group_mid;           // the first mid sample of the first group, maybe before mid_begin
    int64_t in_begin, in_end;    // inputs inside the image

    Span(const Axis& axis, int64_t begin, int64_t end) : out_begin(begin), out_end(end) {
        window = axis.first_mid(begin);
        window_end = axis.first_mid(end - 1) + axis.down_taps;
        mid_begin = std::clamp<int64_t>(window, 0, axis.mid);
        mid_end = std::clamp<int64_t>(window_end, mid_begin, axis.mid);
        own_begin = mid_begin;
        own_end = end == axis.out ? mid_end : std::clamp(axis.first_mid(end), mid_begin, mid_end);
        group = axis.first_input(mid_begin);
        num_groups = mid_end > mid_begin ? axis.first_input(mid_end - 1) - group + 1 : 0;
        group_mid = axis.up_offset + axis.up * (group - 1) + 1;
        in_begin = std::clamp<int64_t>(group, 0, axis.in);
        in_end = std::clamp<int64_t>(group + num_groups + axis.num_steps() - 1, in_begin, axis.in);
    }
    int64_t mid_origin() const { return std::min(window, group_mid); }
};
