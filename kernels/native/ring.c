/* Weights of rings, and the gradients of rings, on a CPU: what fxrpg/generators/ring.py does in several passes, in one. */

#include <stdint.h>
#include <string.h>

#include "layout.h"
#include "random.h"
#include "transpose.h"

typedef struct {
    layout to;
    bijection pi;
    int64_t first;         /* logical element of the whole weight with which this part begins */
    int64_t block, size;   /* elements that stay together; cells of the ring */
    int64_t before, after; /* added to a block's number before it is permuted, and to its image */
    int64_t hash_rows;     /* over 0: cells are hashed, to so many rows of the ring */
    int64_t arc;           /* blocks are permuted within a stretch of the ring that begins with block `after` */
    int64_t once;          /* no two elements read the same cell */
    uint32_t cell[2], sign[2];
    int64_t reflect;
} ring_view;

/* x mod n for 0 <= x < 2^52, by a reciprocal: a division would cost more than all else of a block. */
static inline int64_t modulo(int64_t x, int64_t n, double reciprocal) {
    int64_t rest = x - (int64_t)((double)x * reciprocal) * n;
    rest += rest < 0 ? n : 0;
    return rest >= n ? rest - n : rest;
}

/* The cell in which each of the blocks first, first + 1, ... of the whole weight starts. */
static inline void cells_of(const ring_view *v, double reciprocal, int64_t first, int n, int64_t *cells) {
    if (v->hash_rows) {
        for (int i = 0; i < n; i++) {
            uint64_t word = word_at((uint32_t)(first + i), v->cell[0], v->cell[1]);
            cells[i] = modulo((int64_t)(word * (uint64_t)v->hash_rows >> 32) * v->block, v->size, reciprocal);
        }
        return;
    }
    permuted(&v->pi, first + v->before, n, cells);
    for (int i = 0; i < n; i++) cells[i] = modulo((cells[i] + v->after) * v->block, v->size, reciprocal);
}

/* The words of signs `first` to `first + STRIP - 1`; of zeros where weights have none. */
static inline void sign_words(const ring_view *v, int64_t first, uint32_t *words) {
    for (int i = 0; i < STRIP; i++) words[i] = v->reflect ? word_at((uint32_t)(first + i), v->sign[0], v->sign[1]) : 0;
}

#define VALUE float
#define WORD uint32_t
#define NAMED(name) name##_32
#define SCALED 1
#include "ring_typed.h"

#define VALUE double
#define WORD uint64_t
#define NAMED(name) name##_64
#define SCALED 1
#include "ring_typed.h"

/* Halves are moved and turned, not scaled: no portable C knows both of their types. */
#define VALUE uint16_t
#define WORD uint16_t
#define NAMED(name) name##_16
#define SCALED 0
#include "ring_typed.h"
