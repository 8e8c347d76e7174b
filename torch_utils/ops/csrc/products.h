// SPDX-License-Identifier: MIT
// Products of matrices: small constant ones with pixels of eight feature maps, and medium-sized ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "lanes.h"

constexpr int64_t kBlockColumns = 2 * kLanes;  // of a block of c; columns come in multiples of it
constexpr int64_t kBlockRows = 6;              // with the columns, as many sums as there are registers
constexpr int64_t kBlockInner = 256;           // terms at a time: their part of b stays in the nearest cache

// Constants, known to the compiler.
template <int R, int C> struct Matrix {
    float at[R][C];
    constexpr Matrix<C, R> transposed() const {
        Matrix<C, R> t{};
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < C; ++j) t.at[j][i] = at[i][j];
        return t;
    }
};

// Row I of the matrix times `from`, a column whose elements are `step` apart; zeros and ones cost nothing.
template <const auto& kMatrix, int I, typename V, int... J>
inline V dot(const V* from, int step, std::integer_sequence<int, J...>) {
    V sum{};
    bool is_first = true;
    const auto add = [&](auto j) {
        constexpr float factor = kMatrix.at[I][j()];
        if constexpr (factor != 0) {
            const V x = from[j() * step];
            const V term = factor == 1 ? x : factor == -1 ? -x : x * factor;
            sum = is_first ? term : sum + term;
            is_first = false;
        }
    };
    (add(std::integral_constant<int, J>{}), ...);
    return sum;
}

template <const auto& kMatrix, int C, typename V, int... I>
inline void multiply(V* to, int to_step, const V* from, int from_step, std::integer_sequence<int, I...>) {
    ((to[I * to_step] = dot<kMatrix, I>(from, from_step, std::make_integer_sequence<int, C>{})), ...);
}

// M x M^T for the C x C elements of x; M is R x C.
template <const auto& kMatrix, int R, int C, typename V>
inline void sandwich(V (&to)[R * R], const V (&x)[C * C]) {
    constexpr auto all_rows = std::make_integer_sequence<int, R>{};
    V half[R * C];
    for (int j = 0; j < C; ++j) multiply<kMatrix, C>(half + j, C, x + j, C, all_rows);
    for (int i = 0; i < R; ++i) multiply<kMatrix, C>(to + i * R, 1, half + i * C, 1, all_rows);
}

// c (rows, 16) += a b: a has elements row_step and inner_step apart, b and c rows of b_step and c_step.
template <int kCount>
inline void multiply_block(const float* a, int64_t row_step, int64_t inner_step, const float* b,
                           int64_t b_step, float* c, int64_t c_step, int64_t inner, bool adds) {
    using V = Lanes<float>;
    V sums[kCount][2];
    for (int i = 0; i < kCount; ++i)
        for (int j = 0; j < 2; ++j) sums[i][j] = adds ? read<V>(c + i * c_step + j * kLanes) : V{};
    for (int64_t k = 0; k < inner; ++k, a += inner_step, b += b_step) {
        const V left = read<V>(b), right = read<V>(b + kLanes);
        for (int i = 0; i < kCount; ++i) {
            const float factor = a[i * row_step];
            sums[i][0] += left * factor;
            sums[i][1] += right * factor;
        }
    }
    for (int i = 0; i < kCount; ++i)
        for (int j = 0; j < 2; ++j) write(c + i * c_step + j * kLanes, sums[i][j]);
}

// Sizes of the matrices of a product c = a b.
struct Product {
    int64_t rows, inner, columns;
    bool adds;  // to what c holds
};

// A right factor: panels of kBlockColumns columns, with rows `row` and panels `panel` elements apart. Rows
// that follow each other in memory are read faster than those of a wide matrix, of which each is a page.
struct Panels {
    const float* data;
    int64_t row, panel;
};

// Terms are added in their order, so that an element of c does not depend on the number of rows or columns.
inline void multiply(const Product& size, const float* a, int64_t row_step, int64_t inner_step,
                     const Panels& b, float* c, int64_t c_step) {
    const auto part = [&](int64_t i, int64_t j, int64_t k, auto count) {
        const float* panel = b.data + j / kBlockColumns * b.panel;
        multiply_block<count()>(a + i * row_step + k * inner_step, row_step, inner_step, panel + k * b.row,
                                b.row, c + i * c_step + j, c_step, std::min(kBlockInner, size.inner - k),
                                size.adds || k > 0);
    };
    const auto block = [&](int64_t i, int64_t j, int64_t k) {
        switch (size.rows - i) {
            case 5: part(i, j, k, std::integral_constant<int, 5>{}); break;
            case 4: part(i, j, k, std::integral_constant<int, 4>{}); break;
            case 3: part(i, j, k, std::integral_constant<int, 3>{}); break;
            case 2: part(i, j, k, std::integral_constant<int, 2>{}); break;
            case 1: part(i, j, k, std::integral_constant<int, 1>{}); break;
            default: part(i, j, k, std::integral_constant<int, kBlockRows>{}); break;
        }
    };
    for (int64_t k = 0; k < size.inner; k += kBlockInner)
        if (size.rows > size.inner)  // c is the largest matrix: through it row by row
            for (int64_t i = 0; i < size.rows; i += kBlockRows)
                for (int64_t j = 0; j < size.columns; j += kBlockColumns) block(i, j, k);
        else
            for (int64_t j = 0; j < size.columns; j += kBlockColumns)
                for (int64_t i = 0; i < size.rows; i += kBlockRows) block(i, j, k);
}
