// Tells which elements of 16 x 16 matrices each invocation of a subgroup holds, for sums in f32 and in
// 32-bit integers and for f16 factors. The specification leaves it open; attend_matrix_i8.comp is written
// for one answer.
//
// words: 256 f32, 256 i32, 256 f16 (two in a word), each the numbers 0 to 255 row by row
//     -> from word 640: the subgroup's size and the three lengths; then, for each of the three, the
//        numbers that invocation 0 holds, that invocation 1 holds, ..
#version 450
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require

layout(local_size_x = 32, local_size_y = 1, local_size_z = 1) in;
layout(set = 0, binding = 0) buffer Words { uint words[]; };

const uint RESULTS = 640;
const uint ELEMENTS = 8;

void main() {
    coopmat<float, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator> sums;
    coopmat<int, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator> integers;
    coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA> factors;
    coopMatLoad(sums, words, 0, 16, gl_CooperativeMatrixLayoutRowMajor);
    coopMatLoad(integers, words, 256, 16, gl_CooperativeMatrixLayoutRowMajor);
    coopMatLoad(factors, words, 512, 8, gl_CooperativeMatrixLayoutRowMajor);
    if (gl_LocalInvocationIndex == 0) {
        words[RESULTS] = gl_SubgroupSize;
        words[RESULTS + 1] = sums.length();
        words[RESULTS + 2] = integers.length();
        words[RESULTS + 3] = factors.length();
    }
    // Counted by the subgroup's own number: with subgroups of another size than 32 the numbers repeat,
    // and the sizes say so.
    uint at = RESULTS + 4 + gl_SubgroupInvocationID * ELEMENTS;
    for (uint e = 0; e < ELEMENTS; e++) {
        words[at + e] = uint(sums[e]);
        words[at + 256 + e] = uint(integers[e]);
        words[at + 512 + e] = uint(float(factors[e]));
    }
}
