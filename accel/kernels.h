// Products of small tiles, written for CPUs with AVX512-VNNI (int8) and AVX512-BF16 (bfloat16). A tile's sums stay in
// registers: 6 rows of up to 64 columns.

#pragma once

#include "numbers.h"

#include <immintrin.h>

namespace {

constexpr int64_t TILE_ROWS = 6, LANES = 16, PANEL = 4 * LANES;

// 2^power, with an error below 2e-7 of the value: as power_of_two, and infinite above 2^128.
WITH_AVX512 inline __m512 powers_of_two(__m512 power) {
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(power, whole);
    __m512 fraction = _mm512_set1_ps(0.000154035304f);
    for (const float factor : {0.00133335581f, 0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147182f, 1.0f}) {
        fraction = _mm512_fmadd_ps(fraction, r, _mm512_set1_ps(factor));
    }
    return _mm512_scalef_ps(fraction, whole);
}

WITH_AVX512 inline __m512 gelus(__m512 x) {
    const __m512 factor = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-2.302208198f * 0.044715f),
                                          _mm512_set1_ps(-2.302208198f));
    const __m512 power = powers_of_two(_mm512_mul_ps(x, factor));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), power));
}

// As scale_of and quantise, for rows of a multiple of 16.
WITH_AVX512 inline float wide_scale_of(const float * row, int64_t n) {
    __m512 largest = _mm512_setzero_ps(), poison = largest;
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512 values = _mm512_loadu_ps(row + i);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
        poison = _mm512_fmadd_ps(values, _mm512_setzero_ps(), poison);
    }
    return _mm512_reduce_max_ps(largest) / 127.0f + _mm512_reduce_add_ps(poison);
}

WITH_AVX512 inline int32_t wide_quantise(const float * row, int64_t n, float scale, int8_t * out) {
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (!std::isfinite(inverse)) {
        std::memset(out, 0, n);
        return 0;
    }
    const __m512 factor = _mm512_set1_ps(inverse);
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + i), factor));
        const __m128i bytes = _mm512_cvtsepi32_epi8(values);
        sums = _mm512_add_epi32(sums, _mm512_cvtepi8_epi32(bytes));
        _mm_storeu_si128((__m128i *) (out + i), bytes);
    }
    return _mm512_reduce_add_epi32(sums);
}

// out [6, 64] = in [6, k] x panel, exact. panel: [k / 4][64][4] of weight + 128, as the instruction multiplies an
// unsigned by a signed byte; so 128 times the sum of each row (row_sums) is taken away. k is a multiple of 4.
WITH_INT8 inline void multiply_int8(
    const int8_t * in, int64_t k, const uint8_t * panel, const int32_t * row_sums, int32_t * out
) {
    __m512i sums[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int64_t row = 0; row < TILE_ROWS; row++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; j++) sums[row][j] = _mm512_set1_epi32(-128 * row_sums[row]);
    }
    for (int64_t i = 0; i < k; i += 4, panel += 4 * PANEL) {
        __m512i weights[4];
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; j++) weights[j] = _mm512_loadu_si512(panel + j * 64);
#pragma GCC unroll 6
        for (int64_t row = 0; row < TILE_ROWS; row++) {
            int32_t four;
            std::memcpy(&four, in + row * k + i, sizeof four);
            const __m512i values = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int64_t j = 0; j < 4; j++) sums[row][j] = _mm512_dpbusd_epi32(sums[row][j], weights[j], values);
        }
    }
#pragma GCC unroll 6
    for (int64_t row = 0; row < TILE_ROWS; row++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; j++) _mm512_storeu_si512(out + row * PANEL + j * LANES, sums[row][j]);
    }
}

// A matrix of bfloat16 in parts, one after the other; in each for every group of 16 columns pairs of its rows, [16][2].
struct Parts {
    const uint16_t * start;
    int64_t n_parts, n_pairs;  // pairs of rows in each
    int64_t part_distance, group_distance, pair_distance;
};

// out [6, 16 WIDTH] = in x parts; in [6, 2 n_parts n_pairs], its rows in_distance apart.
template <int WIDTH>
WITH_BF16 inline void multiply_bf16(
    const uint16_t * in, int64_t in_distance, const Parts & parts, float * out, int64_t out_distance
) {
    __m512 sums[TILE_ROWS][WIDTH];
#pragma GCC unroll 6
    for (int64_t row = 0; row < TILE_ROWS; row++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < WIDTH; j++) sums[row][j] = _mm512_setzero_ps();
    }
    const int64_t n_pairs = parts.n_pairs, group_distance = parts.group_distance, pair_distance = parts.pair_distance;
    for (int64_t part = 0; part < parts.n_parts; part++) {
        const uint16_t * right = parts.start + part * parts.part_distance;
        for (int64_t pair = 0; pair < n_pairs; pair++, in += 2, right += pair_distance) {
            __m512bh columns[WIDTH];
#pragma GCC unroll 4
            for (int64_t j = 0; j < WIDTH; j++) columns[j] = (__m512bh) _mm512_loadu_si512(right + j * group_distance);
#pragma GCC unroll 6
            for (int64_t row = 0; row < TILE_ROWS; row++) {
                int32_t two;
                std::memcpy(&two, in + row * in_distance, sizeof two);
                const __m512bh values = (__m512bh) _mm512_set1_epi32(two);
#pragma GCC unroll 4
                for (int64_t j = 0; j < WIDTH; j++) sums[row][j] = _mm512_dpbf16_ps(sums[row][j], columns[j], values);
            }
        }
    }
#pragma GCC unroll 6
    for (int64_t row = 0; row < TILE_ROWS; row++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < WIDTH; j++) _mm512_storeu_ps(out + row * out_distance + j * LANES, sums[row][j]);
    }
}

// As multiply_bf16, for any number of groups of 16 columns.
WITH_BF16 inline void multiply_groups(
    const uint16_t * in, int64_t in_distance, Parts parts, int64_t n_groups, float * out, int64_t out_distance
) {
    for (int64_t done = 0; done < n_groups; done += 4, parts.start += 4 * parts.group_distance) {
        float * place = out + done * LANES;
        switch (std::min<int64_t>(4, n_groups - done)) {
            case 1: multiply_bf16<1>(in, in_distance, parts, place, out_distance); break;
            case 2: multiply_bf16<2>(in, in_distance, parts, place, out_distance); break;
            case 3: multiply_bf16<3>(in, in_distance, parts, place, out_distance); break;
            default: multiply_bf16<4>(in, in_distance, parts, place, out_distance);
        }
    }
}

// out = row x factor, rounded to the nearest. Returns 0, or NaN where a value is not finite.
WITH_BF16 inline float narrow(const float * row, int64_t n, float factor, uint16_t * out) {
    const __m512 factors = _mm512_set1_ps(factor);
    __m512 poison = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) {
        const __mmask16 used = n - i < LANES ? (__mmask16) ((1u << (n - i)) - 1) : (__mmask16) 0xffff;
        const __m512 values = _mm512_maskz_loadu_ps(used, row + i);
        poison = _mm512_fmadd_ps(values, _mm512_setzero_ps(), poison);
        _mm256_mask_storeu_epi16(out + i, used, (__m256i) _mm512_cvtneps_pbh(_mm512_mul_ps(values, factors)));
    }
    return _mm512_reduce_add_ps(poison);
}

// weights = 2^(scores + mask - their largest), for rows of a multiple of 16; without a mask, the first n count. Returns
// the sum before rounding; NaN where a score is not a number.
WITH_BF16 inline float soft_weights(float * scores, const float * mask, int64_t n, int64_t width, uint16_t * weights) {
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    __m512 largest = hidden, poison = _mm512_setzero_ps(), sums = poison;
    for (int64_t i = 0; i < width; i += LANES) {
        __m512 values = _mm512_loadu_ps(scores + i);
        if (mask) {
            values = _mm512_add_ps(values, _mm512_loadu_ps(mask + i));
            _mm512_storeu_ps(scores + i, values);
        } else if (n - i < LANES) {
            values = _mm512_mask_mov_ps(hidden, (__mmask16) ((1u << (n - i)) - 1), values);
            _mm512_storeu_ps(scores + i, values);
        }
        const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        poison = _mm512_mask_mov_ps(poison, is_nan, values);
        largest = _mm512_max_ps(largest, values);
    }
    const float spoilt = _mm512_reduce_add_ps(poison), most = _mm512_reduce_max_ps(largest);
    const __m512 shift = _mm512_set1_ps(most == -INFINITY ? 0.0f : most);  // nothing may be seen: all are 0
    for (int64_t i = 0; i < width; i += LANES) {
        const __m512 power = _mm512_sub_ps(_mm512_loadu_ps(scores + i), shift);
        const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 r = _mm512_sub_ps(power, whole);
        // fewer terms than powers_of_two has: their error is below 5e-5, that of bfloat16 2e-3
        __m512 fraction = _mm512_set1_ps(0.00961812911f);
        for (const float factor : {0.0555041087f, 0.240226507f, 0.693147182f, 1.0f}) {
            fraction = _mm512_fmadd_ps(fraction, r, _mm512_set1_ps(factor));
        }
        const __m512 value = _mm512_scalef_ps(fraction, whole);
        sums = _mm512_add_ps(sums, value);
        _mm256_storeu_si256((__m256i *) (weights + i), (__m256i) _mm512_cvtneps_pbh(value));
    }
    return _mm512_reduce_add_ps(sums) + spoilt;
}

// out [16][16] = in [16][16] transposed; the rows of in are in_distance apart.
WITH_AVX512 inline void transpose(const uint32_t * in, int64_t in_distance, uint32_t * out) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * in_distance);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // quarters of 4: rows 0-3 x 4-7, 8-11 x 12-15
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(out + i * 16, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 8) * 16, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(out + (i + 4) * 16, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(out + (i + 12) * 16, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

}  // namespace
