/* What this machine multiplies and adds at most, from registers to registers: independent chains of one instruction per
 * thread. Prints, for each number of threads that is asked for, a line for every instruction that the machine has: the
 * threads, the type, the instruction, and GMAC/s in the best turn and in the middle one, which falls when others take
 * the processor.  cc -O2 -pthread peak.c -o peak && ./peak THREADS...  */
#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TURNS 9
#define ANY 1e-9f /* what the registers hold: any number takes the same time */

/* Vectors: of 32 registers, 12 chains hide the latency of two units. */
#define CHAINS 12
#define PASSES 4000000L
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vnni,avx512bf16")))
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define CHAIN(NAME, INSTRUCTION)                                                                      \
    WIDE static void *NAME(void *result) {                                                            \
        __m512 sum[CHAINS], x = _mm512_set1_ps(ANY), y = x;                                            \
        _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_setzero_ps();       \
        for (long pass = 0; pass < PASSES; pass++) {                                                   \
            EACH(INSTRUCTION)                                                                         \
        }                                                                                             \
        _Pragma("GCC unroll 12") for (int i = 1; i < CHAINS; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]); \
        *(float *)result = _mm512_reduce_add_ps(sum[0]);                                              \
        return NULL;                                                                                  \
    }
#define FP32(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(sum[i]) : "v"(x), "v"(y));
#define BF16(i) __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(sum[i]) : "v"(x), "v"(y));
#define INT8(i) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(sum[i]) : "v"(x), "v"(y));
CHAIN(fp32, FP32)
CHAIN(bf16, BF16)
CHAIN(int8, INT8)

/* AMX: tiles of 16 rows of 64 bytes. Of 8 registers, 6 are chains, and 2 hold what all of them multiply. */
#define TILE_CHAINS 6
#define TILE_PASSES 300000L
#define TILES __attribute__((target("amx-tile,amx-int8,amx-bf16")))
#define EACH_TILE(DO) DO("%%tmm0") DO("%%tmm1") DO("%%tmm2") DO("%%tmm3") DO("%%tmm4") DO("%%tmm5")
#define ZERO(tile) "tilezero " tile "\n\t"
#define TILE_CHAIN(NAME, INSTRUCTION)                                                                 \
    TILES static void *NAME(void *result) {                                                           \
        float given[16][16];                                                                          \
        for (int i = 0; i < 256; i++) given[i / 16][i % 16] = ANY;                                     \
        __asm__ volatile("ldtilecfg %0" : : "m"(shapes));                                             \
        __asm__ volatile("tileloadd (%0, %1, 1), %%tmm6\n\ttileloadd (%0, %1, 1), %%tmm7"              \
                         : : "r"(given), "r"(64L) : "memory");                                        \
        __asm__ volatile(EACH_TILE(ZERO) : :);                                                        \
        for (long pass = 0; pass < TILE_PASSES; pass++) __asm__ volatile(EACH_TILE(INSTRUCTION) : :); \
        __asm__ volatile("tilestored %%tmm0, (%0, %1, 1)" : : "r"(given), "r"(64L) : "memory");       \
        __asm__ volatile("tilerelease" : :);                                                          \
        *(float *)result = given[0][0];                                                               \
        return NULL;                                                                                  \
    }
#define TILE_BF16(tile) "tdpbf16ps %%tmm7, %%tmm6, " tile "\n\t"
#define TILE_INT8(tile) "tdpbusd %%tmm7, %%tmm6, " tile "\n\t"
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
TILE_CHAIN(tile_bf16, TILE_BF16)
TILE_CHAIN(tile_int8, TILE_INT8)

/* Whether the processor has tiles with what this bit of CPUID 7's EDX stands for; Linux gives them to who asks. */
static int has_tiles(int bit) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & d >> bit & 1)) return 0;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(const char *type, const char *instruction, void *(*chain)(void *), double products, int threads) {
    pthread_t *thread = malloc(threads * sizeof *thread);
    float *result = malloc(threads * sizeof *result);
    double taken[TURNS], work = 1e-9 * products * threads;
    for (int turn = 0; turn < TURNS; turn++) {
        double start = seconds();
        for (int i = 0; i < threads; i++) pthread_create(&thread[i], NULL, chain, &result[i]);
        for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
        taken[turn] = seconds() - start;
    }
    free(thread);
    free(result);
    qsort(taken, TURNS, sizeof *taken, ascending);
    printf("%d %s %s %.1f %.1f\n", threads, type, instruction, work / taken[0], work / taken[TURNS / 2]);
}

int main(int count, char **words) {
    const double vectors = (double)CHAINS * PASSES, tiles = (double)TILE_CHAINS * TILE_PASSES;
    __builtin_cpu_init();
    int wide = __builtin_cpu_supports("avx512f");
    int bfloats = wide && __builtin_cpu_supports("avx512bf16"), bytes = wide && __builtin_cpu_supports("avx512vnni");
    int tile_bfloats = has_tiles(22), tile_bytes = has_tiles(25);
    for (int k = 1; k < count; k++) {
        int threads = atoi(words[k]);
        if (threads < 1) return 2;
        if (wide) measure("fp32", "vfmadd231ps", fp32, 16 * vectors, threads);
        if (bfloats) measure("bf16", "vdpbf16ps", bf16, 32 * vectors, threads);
        if (tile_bfloats) measure("bf16", "tdpbf16ps", tile_bf16, 16 * 16 * 32 * tiles, threads);
        if (bytes) measure("int8", "vpdpbusd", int8, 64 * vectors, threads);
        if (tile_bytes) measure("int8", "tdpbusd", tile_int8, 16 * 16 * 64 * tiles, threads);
    }
    return 0;
}
