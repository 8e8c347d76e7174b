// SPDX-License-Identifier: MIT
// One axis of Winograd's minimal filtering F(4, 3): four outputs of a three-tap correlation by six products.
//
// Six inputs and three weights are polynomials; their product is known from its values at six points, here
// 0, +-sqrt(2), +-1/sqrt(2) and infinity (Toom and Cook; S. Winograd; for images A. Lavin, arXiv:1509.09308).
// With points +-a and +-1/a coefficients stay small, so that rounding is no larger than that of the direct
// sum; the usual points 0, +-1, +-2 lose most of a digit. V is a vector or a number, T its element type.
#pragma once

constexpr int kTile = 4;                // outputs along one axis
constexpr int kPatch = 6;               // inputs that they depend on, and products
constexpr int kTaps = kPatch * kPatch;  // products of a tile

template <typename T> constexpr T kRoot = T(1.41421356237309504880);
template <typename T> constexpr T kHalfRoot = T(0.70710678118654752440);

// From six inputs to the factors of the six products.
template <typename T, typename V> inline void transform_input(const V (&d)[kPatch], V (&to)[kPatch]) {
    const V wide_even = d[4] - T(0.5) * d[2], wide_odd = kRoot<T> * d[3] - kHalfRoot<T> * d[1];
    const V near_even = d[4] - T(2) * d[2], near_odd = kHalfRoot<T> * d[3] - kRoot<T> * d[1];
    to[0] = d[0] - T(2.5) * d[2] + d[4];
    to[1] = wide_even + wide_odd;
    to[2] = wide_even - wide_odd;
    to[3] = near_even + near_odd;
    to[4] = near_even - near_odd;
    to[5] = d[1] - T(2.5) * d[3] + d[5];
}

// From three weights to the other factors.
template <typename T, typename V> inline void transform_weight(const V (&g)[3], V (&to)[kPatch]) {
    const V wide_even = T(1. / 6) * g[0] + T(1. / 3) * g[2], wide_odd = T(1. / 6) * kRoot<T> * g[1];
    const V near_even = T(-2. / 3) * g[0] - T(1. / 3) * g[2], near_odd = T(-2. / 3) * kHalfRoot<T> * g[1];
    to[0] = g[0];
    to[1] = wide_even + wide_odd;
    to[2] = wide_even - wide_odd;
    to[3] = near_even + near_odd;
    to[4] = near_even - near_odd;
    to[5] = g[2];
}

// Four outputs from six products.
template <typename T, typename V> inline void transform_output(const V (&m)[kPatch], V (&to)[kTile]) {
    const V wide_even = m[1] + m[2], wide_odd = m[1] - m[2], near_even = m[3] + m[4], near_odd = m[3] - m[4];
    to[0] = m[0] + wide_even + near_even;
    to[1] = kRoot<T> * wide_odd + kHalfRoot<T> * near_odd;
    to[2] = T(2) * wide_even + T(0.5) * near_even;
    to[3] = T(2) * kRoot<T> * wide_odd + T(0.5) * kHalfRoot<T> * near_odd + m[5];
}

// Transposed transform_output: from the gradient of four outputs to that of six products.
template <typename T, typename V> inline void transform_gradient(const V (&g)[kTile], V (&to)[kPatch]) {
    const V wide_even = g[0] + T(2) * g[2], wide_odd = kRoot<T> * (g[1] + T(2) * g[3]);
    const V near_even = g[0] + T(0.5) * g[2], near_odd = kHalfRoot<T> * (g[1] + T(0.5) * g[3]);
    to[0] = g[0];
    to[1] = wide_even + wide_odd;
    to[2] = wide_even - wide_odd;
    to[3] = near_even + near_odd;
    to[4] = near_even - near_odd;
    to[5] = g[3];
}

// Transposed transform_weight.
template <typename T, typename V> inline void transform_weight_gradient(const V (&u)[kPatch], V (&to)[3]) {
    const V wide_even = u[1] + u[2], wide_odd = u[1] - u[2], near_even = u[3] + u[4], near_odd = u[3] - u[4];
    to[0] = u[0] + T(1. / 6) * wide_even - T(2. / 3) * near_even;
    to[1] = T(1. / 6) * kRoot<T> * wide_odd - T(2. / 3) * kHalfRoot<T> * near_odd;
    to[2] = T(1. / 3) * (wide_even - near_even) + u[5];
}
