// Rows of numbers: rounding them to int8 and bfloat16, GELU, softmax, normalisation.
//
// A value that is not finite makes its token's scale NaN, and so the whole row: a failure is never a score.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// The loops below are compiled for each of these; the loader picks what the CPU has.
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// What is written with a CPU's own instructions; called only where it has them.
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define WITH_INT8 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")))
#define INLINE inline __attribute__((always_inline))

namespace {

// for |value| <= 127
INLINE int8_t nearest(float value) {
    const float shifted = value + 12582912.0f;  // 1.5 x 2^23: the lowest byte is the nearest integer
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return (int8_t) bits;
}

// The scale with which the row's largest value becomes 127; NaN where a value is not finite, 0 for a row of zeroes.
VECTORISED float scale_of(const float * row, int64_t n) {
    float largest = 0.0f, poison = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t i = 0; i < n; i++) {
        largest = std::max(largest, std::fabs(row[i]));
        poison += row[i] * 0.0f;  // 0, or NaN for NaN and infinities
    }
    return largest / 127.0f + poison;
}

// Returns the sum of what was written.
VECTORISED int32_t quantise(const float * row, int64_t n, float scale, int8_t * out) {
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;  // 0 for NaN too: its scale spoils the whole row
    if (!std::isfinite(inverse)) {                              // a denormal scale
        std::memset(out, 0, n);
        return 0;
    }
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        out[i] = nearest(row[i] * inverse);
        sum += out[i];
    }
    return sum;
}

// 2^power: the whole part by the bits of a float, the rest by a polynomial (the Taylor series of 2^r for |r| <= 1/2;
// its error is below 2e-7 of the value). 0 below 2^-126, and not more than 2^126.
INLINE float power_of_two(float power) {
    const float bounded = std::min(126.0f, std::max(-126.0f, power));
    const float whole = (bounded + 12582912.0f) - 12582912.0f;  // rounds to the nearest
    const float r = bounded - whole;
    const float fraction = 1.0f + r * (0.693147182f + r * (0.240226507f + r * (0.0555041087f + r * (0.00961812911f +
                           r * (0.00133335581f + r * 0.000154035304f)))));
    const int32_t bits = ((int32_t) whole + 127) << 23;
    float two_to_whole;
    std::memcpy(&two_to_whole, &bits, sizeof bits);
    return power < -126.0f ? 0.0f : fraction * two_to_whole;
}

// ggml's own approximation of GELU (ggml_gelu): 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which is
// x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3))).
INLINE float gelu(float x) {
    return x / (1.0f + power_of_two(-2.302208198f * x * (1.0f + 0.044715f * x * x)));
}

// half-precision floats, as ggml keeps keys, values and masks
VECTORISED void widen(const uint16_t * halves, int64_t n, float * out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const uint32_t exponent = halves[i] & 0x7c00u, sign = (uint32_t) (halves[i] & 0x8000u) << 16;
        uint32_t bits = (uint32_t) (halves[i] & 0x7fffu) << 13;
        float value;
        std::memcpy(&value, &bits, sizeof bits);
        value *= 0x1p112f;  // the difference of the exponents' biases; right for denormals too
        std::memcpy(&bits, &value, sizeof bits);
        bits |= sign | (exponent == 0x7c00u ? 0x7f800000u : 0u);  // infinities and NaN stay what they are
        std::memcpy(&out[i], &bits, sizeof bits);
    }
}

// exp(row + mask - their largest), in place. Returns the sum; NaN where a score is not a number.
VECTORISED float exponentials(float * row, const float * mask, int64_t n) {
    float largest = -INFINITY, sum = 0.0f, poison = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t i = 0; i < n; i++) {
        row[i] += mask[i];
        largest = std::max(largest, row[i]);
        poison += row[i] == row[i] ? 0.0f : row[i];
    }
    if (largest == -INFINITY) {  // nothing may be seen, or there are no numbers
        std::memset(row, 0, n * sizeof(float));
        return poison;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        row[i] = power_of_two((row[i] - largest) * 1.44269504f);
        sum += row[i];
    }
    return sum + poison;
}

VECTORISED void scale_row(const float * row, int64_t n, float factor, float * out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = row[i] * factor;
}

// (row - its mean) / its standard deviation, or without the mean: row / its root mean square. Then x weight + bias, each
// of which may be null. in and out may be the same.
VECTORISED void normalise(
    const float * in, int64_t n, bool subtracts_mean, float epsilon, const float * weight, const float * bias, float * out
) {
    float sum = 0.0f, squares = 0.0f;
    if (subtracts_mean) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += in[i];
    }
    const float mean = sum / (float) n;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; i++) squares += (in[i] - mean) * (in[i] - mean);
    const float factor = 1.0f / std::sqrt(squares / (float) n + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = (in[i] - mean) * factor;
    if (weight) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] *= weight[i];
    }
    if (bias) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] += bias[i];
    }
}

}  // namespace
