// Softmax attention of packed pairs: llama.cpp puts many pairs into a batch and masks what belongs to others; ggml
// computes all of it, here keys that no query of a tile may see are left out. In bfloat16 where the CPU multiplies that,
// else in float32.

#pragma once

#include "kernels.h"
#include "products.h"

namespace {

constexpr uint16_t MINUS_INFINITY = 0xfc00;

// -- in float32 -------------------------------------------------------------------------------------------------------

constexpr int64_t TILE = 24;   // query tokens that are attended with together
constexpr int64_t BLOCK = 32;  // key tokens that are left out together when nobody in the tile may see them
constexpr int64_t STEP_ROWS = 6, STEP_COLUMNS = 16;  // of a product's innermost loop: its sums stay in registers

// c [6, 16] += a [6, k] x b [k, 16]
VECTORISED void multiply_add(
    const float * a, int64_t a_distance, const float * b, int64_t b_distance, int64_t k, float * c, int64_t c_distance
) {
    typedef float Wide __attribute__((vector_size(4 * STEP_COLUMNS), aligned(4), may_alias));
    Wide sums[STEP_ROWS];
#pragma GCC unroll 6
    for (int64_t row = 0; row < STEP_ROWS; row++) sums[row] = *(const Wide *) (c + row * c_distance);
    for (int64_t i = 0; i < k; i++) {
        const Wide right = *(const Wide *) (b + i * b_distance);
#pragma GCC unroll 6
        for (int64_t row = 0; row < STEP_ROWS; row++) sums[row] += a[row * a_distance + i] * right;
    }
#pragma GCC unroll 6
    for (int64_t row = 0; row < STEP_ROWS; row++) *(Wide *) (c + row * c_distance) = sums[row];
}

// Softmax attention in float32. llama.cpp packs many pairs into a batch and masks what belongs to others; ggml computes
// all of it, here blocks of keys that a whole tile of queries must not see are left out.
class FloatAttention {
  public:
    void compute(const ggml_tensor * op, int n_threads) {
        const ggml_tensor *q = op->src[0], *k = op->src[1];
        const int64_t d = q->ne[0], n_tokens = q->ne[1], n_heads = q->ne[2], n_kv_heads = k->ne[2];
        n_blocks = (k->ne[1] + BLOCK - 1) / BLOCK;
        const int64_t n_tiles = (n_tokens + TILE - 1) / TILE, n_kept = n_kv_heads * n_blocks;
        // nothing is allocated in the parallel part: an exception could not leave it
        keys.resize(std::max(keys.size(), (size_t) (n_kept * BLOCK * d)));
        values.resize(keys.size());
        seen.resize(std::max(seen.size(), (size_t) (n_tiles * n_blocks)));
        n_seen.resize(std::max(n_seen.size(), (size_t) n_tiles));
        scratch.resize(std::max(scratch.size(), (size_t) (n_threads * scratch_floats(d))));
#pragma omp parallel num_threads(n_threads)
        {
            float * own = &scratch[omp_get_thread_num() * scratch_floats(d)];
#pragma omp for schedule(static) nowait
            for (int64_t tile = 0; tile < n_tiles; tile++) find_seen(op, tile);
#pragma omp for schedule(static)
            for (int64_t item = 0; item < n_kept; item++) keep(op, item, own);
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < n_heads * n_tiles; item++) attend(op, item / n_heads, item % n_heads, own);
        }
    }

  private:
    int64_t scratch_floats(int64_t d) const { return 2 * TILE * d + (TILE + 1) * n_blocks * BLOCK + BLOCK * d; }

    static const uint16_t * halves(const ggml_tensor * tensor, int64_t token, int64_t head) {
        const char * row = (const char *) tensor->data + token * tensor->nb[1] + head * tensor->nb[2];
        return (const uint16_t *) (const void *) row;
    }

    // Which blocks of keys a token of the tile may see.
    void find_seen(const ggml_tensor * op, int64_t tile) {
        const int64_t first = tile * TILE, n = std::min(TILE, op->src[0]->ne[1] - first), n_kv = op->src[1]->ne[1];
        int32_t * own = &seen[tile * n_blocks];
        n_seen[tile] = 0;
        for (int64_t block = 0; block < n_blocks; block++) {
            bool is_seen = false;
            for (int64_t row = 0; row < n && !is_seen; row++) {
                const uint16_t * mask = halves(op->src[3], first + row, 0) + block * BLOCK;
                const int64_t n_keys = std::min(BLOCK, n_kv - block * BLOCK);
                for (int64_t i = 0; i < n_keys; i++) is_seen |= mask[i] != MINUS_INFINITY;
            }
            if (is_seen) {
                own[n_seen[tile]++] = (int32_t) block;
            }
        }
    }

    // One block of one head: its keys transposed, [d, BLOCK], and its values, [BLOCK, d]; zeroes after the last.
    void keep(const ggml_tensor * op, int64_t item, float * own) {
        const int64_t d = op->src[0]->ne[0], head = item / n_blocks, first = item % n_blocks * BLOCK;
        const int64_t n = std::min(BLOCK, op->src[1]->ne[1] - first);
        float *transposed = &keys[item * BLOCK * d], *straight = &values[item * BLOCK * d];
        std::memset(own, 0, BLOCK * d * sizeof(float));
        std::memset(straight, 0, BLOCK * d * sizeof(float));
        for (int64_t i = 0; i < n; i++) {
            widen(halves(op->src[1], first + i, head), d, own + i * d);
            widen(halves(op->src[2], first + i, head), d, straight + i * d);
        }
        for (int64_t j = 0; j < d; j++) {
            for (int64_t i = 0; i < BLOCK; i++) transposed[j * BLOCK + i] = own[i * d + j];
        }
    }

    // One head of one tile: out = softmax(scale q k^T + mask) v.
    void attend(const ggml_tensor * op, int64_t tile, int64_t head, float * own) {
        const ggml_tensor *q = op->src[0], *k = op->src[1];
        const int64_t d = q->ne[0], first = tile * TILE, n = std::min(TILE, q->ne[1] - first);
        const int64_t width = n_seen[tile] * BLOCK, offset = head / (q->ne[2] / k->ne[2]) * n_blocks * BLOCK * d;
        const int32_t * blocks = &seen[tile * n_blocks];
        float *queries = own, *out = queries + TILE * d, *scores = out + TILE * d, *mask = scores + TILE * width;
        float scale, sums[TILE];
        std::memcpy(&scale, op->op_params, sizeof scale);
        std::memset(own, 0, (2 * TILE * d + TILE * width) * sizeof(float));
        for (int64_t row = 0; row < n; row++) {
            const char * from = (const char *) q->data + (first + row) * q->nb[1] + head * q->nb[2];
            scale_row((const float *) (const void *) from, d, scale, queries + row * d);
        }
        for (int64_t i = 0; i < n_seen[tile]; i++) {
            const float * block = &keys[offset + blocks[i] * BLOCK * d];
            for (int64_t row = 0; row < n; row += STEP_ROWS) {
                for (int64_t column = 0; column < BLOCK; column += STEP_COLUMNS) {
                    multiply_add(queries + row * d, d, block + column, BLOCK, d,
                                 scores + row * width + i * BLOCK + column, width);
                }
            }
        }
        for (int64_t row = 0; row < n; row++) {
            std::fill(mask, mask + width, -INFINITY);
            for (int64_t i = 0; i < n_seen[tile]; i++) {
                const int64_t start = blocks[i] * BLOCK;
                widen(halves(op->src[3], first + row, 0) + start, std::min(BLOCK, k->ne[1] - start), mask + i * BLOCK);
            }
            sums[row] = exponentials(scores + row * width, mask, width);
        }
        for (int64_t i = 0; i < n_seen[tile]; i++) {
            const float * block = &values[offset + blocks[i] * BLOCK * d];
            for (int64_t row = 0; row < n; row += STEP_ROWS) {
                for (int64_t column = 0; column < d; column += STEP_COLUMNS) {
                    multiply_add(scores + row * width + i * BLOCK, width, block + column, d, BLOCK,
                                 out + row * d + column, d);
                }
            }
        }
        for (int64_t row = 0; row < n; row++) {
            float * place = (float *) op->data + ((first + row) * q->ne[2] + head) * d;
            scale_row(out + row * d, d, sums[row] == 0.0f ? 0.0f : 1.0f / sums[row], place);
        }
    }

    int64_t n_blocks = 0;
    std::vector<float> keys, values;  // [kv head, block, d, BLOCK] and [kv head, block, BLOCK, d]
    std::vector<int32_t> seen;        // [tile, block]: the blocks that a token of the tile may see come first
    std::vector<int64_t> n_seen;      // of each tile
    std::vector<float> scratch;       // of each thread
};

// -- in bfloat16 ------------------------------------------------------------------------------------------------------

constexpr int64_t MOST_QUERIES = 48;  // in a tile
constexpr int64_t GROUP = LANES;      // keys that are kept together
constexpr float LOG2_E = 1.44269504f;

// Whether some key that `before` lets see is hidden by `after`.
VECTORISED bool hides_more(const uint16_t * before, const uint16_t * after, int64_t n) {
    uint16_t hidden = 0;
#pragma omp simd reduction(| : hidden)
    for (int64_t i = 0; i < n; i++) {
        hidden |= (uint16_t) ((before[i] != MINUS_INFINITY ? 1 : 0) & (after[i] == MINUS_INFINITY ? 1 : 0));
    }
    return hidden != 0;
}

// Which queries of a mask are computed together, and with which keys: found once for all layers and heads.
//
// A segment is what belongs to one sequence, whatever else is in the batch: queries one after the other that see what
// the one before sees, and perhaps more. Its keys are numbered among themselves, so that all sums are made in an order
// that does not depend on where in the batch the sequence stands: the results are the same to the bit in any company.
class Plan {
  public:
    struct Segment {
        int64_t first_group;  // among the groups of all segments
        std::vector<int32_t> keys;
    };
    struct Tile {
        int64_t first, n;       // queries
        size_t segment;
        int64_t n_groups;       // of the segment's keys that one of them sees
        bool is_uniform;        // they all see all of them, and no other bias
    };
    std::vector<Segment> segments;
    std::vector<Tile> tiles;
    std::vector<size_t> segment_of;  // each group
    int64_t most_groups = 0;         // in a tile

    void forget() { known = nullptr; }

    void make(const ggml_tensor * mask, int64_t n_queries, int64_t n_keys) {
        if (mask->data == known && n_queries == queries && n_keys == keys) {
            return;
        }
        known = mask->data, queries = n_queries, keys = n_keys, most_groups = 0;
        segments.clear(), tiles.clear(), segment_of.clear();
        for (int64_t first = 0, end; first < queries; first = end) {
            for (end = first + 1; end < queries && !hides_more(row(mask, end - 1), row(mask, end), keys);) end++;
            add_segment(mask, first, end);
        }
    }

    static const uint16_t * row(const ggml_tensor * mask, int64_t query) {
        return (const uint16_t *) (const void *) ((const char *) mask->data + query * mask->nb[1]);
    }

  private:
    void add_segment(const ggml_tensor * mask, int64_t first, int64_t end) {
        Segment segment{(int64_t) segment_of.size(), {}};
        const uint16_t * seen = row(mask, end - 1);
        for (int64_t key = 0; key < keys; key++) {
            if (seen[key] != MINUS_INFINITY) {
                segment.keys.push_back((int32_t) key);
            }
        }
        segment_of.resize(segment_of.size() + (segment.keys.size() + GROUP - 1) / GROUP, segments.size());
        const int64_t n = end - first, n_tiles = (n + MOST_QUERIES - 1) / MOST_QUERIES;
        const int64_t size = ((n + n_tiles - 1) / n_tiles + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        for (int64_t query = first; query < end; query += size) {
            add_tile(mask, query, std::min(size, end - query), segment.keys);
        }
        segments.push_back(std::move(segment));
    }

    void add_tile(const ggml_tensor * mask, int64_t first, int64_t n, const std::vector<int32_t> & keys_of_segment) {
        const uint16_t *first_row = row(mask, first), *last_row = row(mask, first + n - 1);
        int64_t n_seen = keys_of_segment.size();
        while (n_seen > 0 && last_row[keys_of_segment[n_seen - 1]] == MINUS_INFINITY) n_seen--;
        bool is_uniform = std::all_of(
            keys_of_segment.begin(), keys_of_segment.end(), [first_row](int32_t key) { return first_row[key] == 0; }
        );
        for (int64_t query = first + 1; query < first + n && is_uniform; query++) {
            is_uniform = std::memcmp(first_row, row(mask, query), keys * sizeof(uint16_t)) == 0;
        }
        tiles.push_back({first, n, segments.size(), (n_seen + GROUP - 1) / GROUP, is_uniform});
        most_groups = std::max(most_groups, tiles.back().n_groups);
    }

    const void * known = nullptr;
    int64_t queries = 0, keys = 0;
};

// Queries, keys, values and the softmax's weights are rounded to bfloat16; sums and the softmax are float32.
class Bf16Attention {
  public:
    void forget() { plan.forget(); }

    // k and v: what the operation reads, or the float32 that it was converted from.
    void compute(const ggml_tensor * op, const ggml_tensor * k, const ggml_tensor * v, int n_threads) {
        const ggml_tensor * q = op->src[0];
        const int64_t d = q->ne[0], n_heads = q->ne[2], n_kv_heads = k->ne[2];
        plan.make(op->src[3], q->ne[1], k->ne[1]);
        // nothing is allocated in the parallel part: an exception could not leave it
        const int64_t n_floats = scratch_floats(d), n_tiles = plan.tiles.size(), n_groups = plan.segment_of.size();
        keys.resize(std::max(keys.size(), (size_t) (n_kv_heads * n_groups * GROUP * d)));
        values.resize(keys.size());
        scratch.resize(std::max(scratch.size(), (size_t) (n_threads * n_floats)));
#pragma omp parallel num_threads(n_threads)
        {
            float * own = &scratch[omp_get_thread_num() * n_floats];
#pragma omp for schedule(static)
            for (int64_t item = 0; item < n_kv_heads * n_groups; item++) {
                keep(k, v, item / n_groups, item % n_groups, item * GROUP * d, own);
            }
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < n_heads * n_tiles; item++) {
                attend(op, plan.tiles[item % n_tiles], item / n_tiles, own);
            }
        }
    }

  private:
    int64_t scratch_floats(int64_t d) const {
        return TILE_ROWS * 2 * d + 3 * TILE_ROWS * plan.most_groups * GROUP + 2 * GROUP * d;
    }

    // One group of one head, in pairs: its keys as [d / 2][16 keys][2], its values as [d / 16][8 pairs of keys][16][2];
    // zeroes after the last.
    WITH_BF16 void keep(
        const ggml_tensor * k, const ggml_tensor * v, int64_t head, int64_t group, int64_t offset, float * own
    ) {
        const int64_t d = k->ne[0];
        uint16_t * rows = (uint16_t *) (void *) (own + d);
        uint16_t *key_pairs = &keys[offset], *value_pairs = &values[offset];
        read_rows(k, head, group, own, rows);
        const uint32_t * words = (const uint32_t *) (const void *) rows;  // pairs
        uint32_t * out = (uint32_t *) (void *) key_pairs;
        int64_t j = 0;
        for (; j + GROUP <= d / 2; j += GROUP) transpose(words + j, d / 2, out + j * GROUP);
        for (; j < d / 2; j++) {
            for (int64_t i = 0; i < GROUP; i++) out[j * GROUP + i] = words[i * d / 2 + j];
        }
        read_rows(v, head, group, own, rows);
        for (int64_t pair = 0; pair < GROUP / 2; pair++) {
            const uint16_t *even = rows + 2 * pair * d, *odd = even + d;
            for (int64_t j = 0; j < d; j += LANES) {
                const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) (even + j)));
                const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) (odd + j)));
                _mm512_storeu_si512(value_pairs + j * GROUP + pair * 2 * LANES,
                                    _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
            }
        }
    }

    // rows [16, d]: those of the group's keys, then zeroes
    WITH_BF16 void read_rows(
        const ggml_tensor * tensor, int64_t head, int64_t group, float * wide, uint16_t * rows
    ) const {
        const Plan::Segment & segment = plan.segments[plan.segment_of[group]];
        const int64_t d = tensor->ne[0], first = (group - segment.first_group) * GROUP;
        const int64_t n = std::min(GROUP, (int64_t) segment.keys.size() - first);
        std::memset(rows, 0, GROUP * d * sizeof(uint16_t));
        for (int64_t i = 0; i < n; i++) {
            const int64_t key = segment.keys[first + i];
            const void * row = (const char *) tensor->data + key * tensor->nb[1] + head * tensor->nb[2];
            if (tensor->type == GGML_TYPE_F16) {
                widen((const uint16_t *) row, d, wide);
                narrow(wide, d, 1.0f, rows + i * d);
            } else {
                narrow((const float *) row, d, 1.0f, rows + i * d);
            }
        }
    }

    // One head of one tile: out = softmax(scale q k^T + mask) v, a few queries at a time.
    WITH_BF16 void attend(const ggml_tensor * op, const Plan::Tile & tile, int64_t head, float * own) const {
        const ggml_tensor *q = op->src[0], *k = op->src[1];
        const Plan::Segment & segment = plan.segments[tile.segment];
        const int64_t d = q->ne[0], n_groups = tile.n_groups, width = n_groups * GROUP;
        const int64_t kv_head = head / (q->ne[2] / k->ne[2]);
        const int64_t offset = (kv_head * (int64_t) plan.segment_of.size() + segment.first_group) * GROUP * d;
        float *out = own, *scores = out + TILE_ROWS * d, *mask = scores + TILE_ROWS * width;
        uint16_t * weights = (uint16_t *) (void *) (mask + width);
        uint16_t * queries = weights + TILE_ROWS * width;
        float scale, sums[TILE_ROWS];
        std::memcpy(&scale, op->op_params, sizeof scale);
        for (int64_t first = tile.first; first < tile.first + tile.n; first += TILE_ROWS) {
            const int64_t n = std::min(TILE_ROWS, tile.first + tile.n - first);
            for (int64_t row = 0; row < n; row++) {
                const char * from = (const char *) q->data + (first + row) * q->nb[1] + head * q->nb[2];
                narrow((const float *) (const void *) from, d, scale * LOG2_E, queries + row * d);
            }
            const Parts k_parts{&keys[offset], 1, d / 2, 0, GROUP * d, 2 * LANES};
            multiply_groups(queries, d, k_parts, n_groups, scores, width);
            for (int64_t row = 0; row < n; row++) {
                if (!tile.is_uniform) {
                    read_mask(op->src[3], first + row, segment.keys, width, mask);
                }
                sums[row] = soft_weights(scores + row * width, tile.is_uniform ? nullptr : mask, segment.keys.size(),
                                         width, weights + row * width);
            }
            const Parts v_parts{&values[offset], n_groups, GROUP / 2, GROUP * d, GROUP * LANES, 2 * LANES};
            multiply_groups(weights, width, v_parts, d / LANES, out, d);
            for (int64_t row = 0; row < n; row++) {
                float * place = (float *) op->data + ((first + row) * q->ne[2] + head) * d;
                scale_row(out + row * d, d, sums[row] == 0.0f ? 0.0f : 1.0f / sums[row], place);
            }
        }
    }

    WITH_BF16 static void read_mask(
        const ggml_tensor * mask, int64_t query, const std::vector<int32_t> & keys, int64_t width, float * out
    ) {
        const uint16_t * row = Plan::row(mask, query);
        const int64_t n = keys.size();
        for (int64_t first = 0; first < width; first += GROUP) {
            alignas(32) uint16_t some[GROUP];
            for (int64_t i = 0; i < GROUP; i++) some[i] = first + i < n ? row[keys[first + i]] : MINUS_INFINITY;
            const __m512 wide = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *) some));
            _mm512_storeu_ps(out + first, _mm512_mul_ps(wide, _mm512_set1_ps(LOG2_E)));
        }
    }

    Plan plan;
    std::vector<uint16_t> keys, values;  // of each kv head and group
    std::vector<float> scratch;          // of each thread
};

}  // namespace
